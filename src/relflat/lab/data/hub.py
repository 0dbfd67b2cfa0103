"""Data sets of the Hugging Face hub, through its client ``datasets`` (extra ``hub``).

CIFAR-100, SVHN and three tasks of GLUE are in no registry package. `save` writes the splits that are used into the
cache in the client's own format, so that reading needs no network; whoever has none can copy that folder from
elsewhere. GLUE keeps the labels of its test sets secret: as everywhere, the official validation set is the test set.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from relflat.errors import DataError
from relflat.lab.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset


def client() -> Any:
    """The module ``datasets``, or an error that says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("Data sets of the Hugging Face hub need its client: pip install 'relflat[hub]'") from error
    return datasets


def save(source: Source, folder: Path) -> None:
    """Fetch a data set from the hub, compare its splits, sizes and columns with the known ones, and write it."""
    datasets = client()
    try:
        found = datasets.load_dataset(source.package, source.config)
    except Exception as error:  # the client lets through errors of several HTTP libraries
        raise DataError(
            f"The hub did not give {source.package!r}: {type(error).__name__}: {error}. It needs a network that "
            f"reaches the Hugging Face hub (HF_ENDPOINT names a mirror; what the client has in its own cache works "
            f"without). Or run '{source.command}' on a machine that reaches it and copy the folder "
            f"{source.folder_name} of its cache to this one's; 'relflat data list' names the cache."
        ) from error
    found = datasets.DatasetDict({split: found[split] for split in source.rows if split in found})
    sizes = {split: len(rows) for split, rows in found.items()}
    columns = {column for rows in found.values() for column in rows.column_names}
    missing = sorted({*source.inputs, source.label} - columns)
    if sizes != source.rows or missing:
        without = f" and no column {', '.join(missing)}" if missing else ""
        raise DataError(
            f"{source.package!r} has the splits {sizes}{without}, but {source.rows} was expected. Nothing was "
            "kept: the hub has another version of this data set than the one that is known here."
        )
    found.save_to_disk(folder)


def splits(source: Source, folder: Path) -> tuple["Dataset", "Dataset"]:
    """The training split and the one for testing, as `save` wrote them."""
    found = client().load_from_disk(folder)
    train, test = (found[split] for split in source.rows)
    return train, test
