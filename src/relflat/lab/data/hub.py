"""Data sets of the Hugging Face hub, through its client ``datasets`` (extra ``hub``).

CIFAR-100, SVHN and three tasks of GLUE are in no registry package. `save` fetches the splits that are used and writes
them into the cache in the client's own format, so that reading needs no network; whoever has none at all can copy
that folder from elsewhere.

GLUE keeps the labels of its test sets to itself: as everywhere, the official validation set is the test set here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relflat.errors import DataError
from relflat.lab.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True)
class HubSet:
    """Where things are inside a data set of the hub.

    Attributes:
        config: the part of the data set; None where it has only one.
        inputs: columns with the inputs: one with pictures, or one or two with texts.
        label: column with the class indices.
        classes: how many classes there are.
        rows: names and sizes of the two splits that are used, training first.
    """

    config: str | None
    inputs: tuple[str, ...]
    label: str
    classes: int
    rows: Mapping[str, int]


HUB_SETS: dict[str, HubSet] = {
    "cifar100": HubSet(None, ("img",), "fine_label", 100, {"train": 50_000, "test": 10_000}),
    "svhn": HubSet("cropped_digits", ("image",), "label", 10, {"train": 73_257, "test": 26_032}),
    "rte": HubSet("rte", ("sentence1", "sentence2"), "label", 2, {"train": 2490, "validation": 277}),
    "mrpc": HubSet("mrpc", ("sentence1", "sentence2"), "label", 2, {"train": 3668, "validation": 408}),
    "sst2": HubSet("sst2", ("sentence",), "label", 2, {"train": 67_349, "validation": 872}),
}


def client() -> Any:
    """The module ``datasets``.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Data sets of the Hugging Face hub need its client: pip install 'relflat[hub]'"
        ) from error
    return datasets


def save(source: Source, folder: Path) -> None:
    """Fetch a data set from the hub, check it and write its two splits into a folder.

    Raises:
        DataError: the client is missing, the hub cannot be reached, or what it gave is not what is expected.
    """
    datasets, place = client(), HUB_SETS[source.name]
    try:
        found = datasets.load_dataset(source.package, place.config)
    except Exception as error:  # the client lets through errors of several HTTP libraries
        raise DataError(
            f"The hub did not give {source.package!r}: {type(error).__name__}: {error}. It needs a network that "
            f"reaches the Hugging Face hub (HF_ENDPOINT names a mirror; what the client has in its own cache works "
            f"without). Or run '{source.command}' on a machine that reaches it and copy the folder "
            f"{source.folder_name} of its cache to this one's; 'relflat data list' names the cache."
        ) from error
    found = datasets.DatasetDict({split: found[split] for split in place.rows if split in found})
    check(source, found)
    found.save_to_disk(folder)


def check(source: Source, found: "DatasetDict") -> None:
    """Compare splits, sizes and columns with what is known of this data set.

    Raises:
        DataError: they differ; the hub has another version.
    """
    place = HUB_SETS[source.name]
    sizes = {split: len(rows) for split, rows in found.items()}
    columns = {column for rows in found.values() for column in rows.column_names}
    missing = sorted({*place.inputs, place.label} - columns)
    if sizes != place.rows or missing:
        without = f" and no column {', '.join(missing)}" if missing else ""
        raise DataError(
            f"{source.package!r} has the splits {sizes}{without}, but {dict(place.rows)} was expected. Nothing was "
            "kept: the hub has another version of this data set than the one that is known here."
        )


def splits(name: str, folder: Path) -> tuple["Dataset", "Dataset"]:
    """The training split and the one for testing, as `save` wrote them.

    Raises:
        DataError: the client is missing or the folder is damaged.
    """
    datasets = client()
    try:
        found = datasets.load_from_disk(folder)
        train, test = (found[split] for split in HUB_SETS[name].rows)
    except Exception as error:  # damaged Arrow files and records raise errors of several libraries
        raise DataError(
            f"{folder} cannot be read: {error}. Delete it and run: relflat data get {name}"
        ) from error
    return train, test
