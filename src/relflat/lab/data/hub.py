"""Data sets of the Hugging Face hub, through its client ``datasets`` (extra ``hub``).

`save` writes the splits that are used into the cache, pictures as arrays and texts in the client's own format, so
that reading needs no network; whoever has none can copy that folder from elsewhere. GLUE keeps the labels of its test
sets secret: as everywhere, the official validation set is the test set.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relflat.errors import DataError
from relflat.lab.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

PATIENCE = 5.0  # seconds until a hub that does not answer is given up, where there is another source


def client(
    package: str = "datasets", use: str = "Data sets of the Hugging Face hub need its client", extra: str = "hub"
) -> Any:
    """The module of an optional package, or an error that says how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise DataError(f"{use}: pip install 'relflat[{extra}]'") from error


@contextmanager
def asking(source: Source) -> Iterator[None]:
    """Explain why the hub does not give a data set, and what to do about it."""
    try:
        yield
    except Exception as error:  # the client lets through errors of several HTTP libraries
        raise DataError(
            f"The hub did not give {source.package!r}: {type(error).__name__}: {str(error).rstrip('.')}. It needs a "
            "network that reaches the Hugging Face hub (HF_ENDPOINT names a mirror; what the client has in its own "
            f"cache works without). Or run '{source.command}' on a machine that reaches it and copy the folder "
            f"{source.folder_name} of its cache to this one's; 'relflat data list' names the cache."
        ) from error


def must_answer(source: Source) -> None:
    """See, before the client tries again and again for half a minute, whether the hub has this set and answers."""
    client()
    from huggingface_hub import HfApi

    with asking(source):
        HfApi().dataset_info(source.package, timeout=PATIENCE)


def save(source: Source, folder: Path) -> None:
    """Fetch a data set from the hub, compare its splits, sizes and columns with the known ones, and write it.

    Raises:
        DataError: the hub gives none, or another one than the one that is known.
    """
    datasets = client()
    with asking(source):
        found = datasets.load_dataset(source.package, source.config)
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
    if source.reader == "hub_pictures":
        for split, rows in found.items():
            save_pictures(source, split, rows, folder)
    else:
        found.save_to_disk(folder)


def save_pictures(source: Source, split: str, rows: "Dataset", folder: Path) -> None:
    """Write the pictures and labels of a split, in the order of its digests where they are known."""
    images, labels = pictures(source, rows)
    if split in source.digests:
        order = blocks(images, labels, source.digests[split])
        images, labels = images[order], labels[order]
    np.save(folder / f"{split}-images.npy", images)
    np.save(folder / f"{split}-labels.npy", labels)


def pictures(source: Source, rows: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    """Bytes (n, channels, height, width) and labels (n,) of a split."""
    found = (picture if picture.mode == "L" else picture.convert("RGB") for picture in rows[source.inputs[0]])
    images = np.stack([np.asarray(picture) for picture in found])
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.asarray(rows[source.label][:], dtype=np.int64)


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of pictures as bytes (n, channels, height, width), then their labels, a byte each."""
    found = hashlib.sha256(np.ascontiguousarray(images, dtype=np.uint8).data)
    found.update(np.ascontiguousarray(labels, dtype=np.uint8).data)
    return found.hexdigest()


def blocks(images: np.ndarray, labels: np.ndarray, digests: Sequence[str]) -> np.ndarray:
    """The order that brings a split's equal blocks into the order of their digests.

    The hub has the five files of CIFAR-10's training set in another order than their numbers; within them nothing
    is moved.

    Raises:
        DataError: the blocks are others.
    """
    parts = np.split(np.arange(len(labels)), len(digests))
    found = {digest(images[part], labels[part]): part for part in parts}
    if set(found) != set(digests):
        other = len(set(digests) - set(found))
        raise DataError(
            f"Of {len(digests)} blocks of {len(labels) // len(digests)} pictures and labels, {other} are not those "
            "that are known (SHA-256). Nothing was kept: it is another version of this data set."
        )
    return np.concatenate([found[one] for one in digests])


def splits(source: Source, folder: Path) -> tuple["Dataset", "Dataset"]:
    """The training split and the one for testing, as `save` wrote them."""
    found = client().load_from_disk(folder)
    train, test = (found[split] for split in source.rows)
    return train, test
