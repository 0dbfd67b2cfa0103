"""Small sets in the hub's own formats stand in for the hub, which no test asks."""

from dataclasses import replace

import numpy as np
import pytest

from relflat.errors import DataError
from relflat.lab.data import fetch, hub
from relflat.lab.data.sources import SOURCES

datasets = pytest.importorskip("datasets", reason="extra 'hub' is not installed")

PICTURES = {"cifar100": ("img", "fine_label"), "svhn": ("image", "label")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


def pixels(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)


def pictures(name: str, rows: int, seed: int):
    """Rows with the columns and feature types that the hub has for this set."""
    from PIL import Image

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
    assert [entry.name for entry in cache.iterdir()] == [place.name]
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
    assert list(cache.iterdir()) == []


def test_without_network_the_error_says_what_to_do(monkeypatch, cache):
    def load_dataset(*arguments):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"Couldn't reach.*relflat data get sst2.*copy the folder sst2-hub"):
        fetch.get("sst2")
    assert list(cache.iterdir()) == []


def test_without_the_client_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'relflat\[hub\]'"):
        fetch.get("sst2")


def test_damaged_folder_is_named():
    folder = fetch.home(SOURCES["svhn"])
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="relflat data get svhn"):
        fetch.read("svhn")
