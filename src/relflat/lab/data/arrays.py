"""Readers: the files of a data set become arrays of pictures and labels.

``read(name)`` gives the pool that training and validation are cut from, and the official test set
where the data set has one.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from relflat.errors import DataError
from relflat.lab.data import hub
from relflat.lab.data.fetch import files
from relflat.lab.names import look_up

if TYPE_CHECKING:
    from datasets import Dataset

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Arrays:
    """Samples held in memory: what the network is given and what it should answer.

    Attributes:
        inputs: one tensor, or the network's keyword arguments by name (token ids, mask); samples come first.
        targets: class indices, or whatever else the task's loss compares outputs with.
    """

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor | slice) -> "Arrays":
        """The samples at these positions."""
        return self._each(lambda values: values[index])

    def to(self, device: torch.device) -> "Arrays":
        """The same samples on a device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Arrays":
        if isinstance(self.inputs, Tensor):
            return Arrays(change(self.inputs), change(self.targets))
        return Arrays({name: change(values) for name, values in self.inputs.items()}, change(self.targets))


@dataclass(frozen=True)
class RawData:
    """A data set of a classification task as it was published, pixels scaled to 0..1.

    Attributes:
        pool: what may be trained and validated on.
        test: the official test set, or None where none was published.
        classes: how many classes there are.
        shifts: further test sets from elsewhere, by name.
    """

    pool: Arrays
    test: Arrays | None
    classes: int
    shifts: Mapping[str, Arrays] = field(default_factory=dict)


def read(name: str) -> RawData:
    """Read a data set.

    Raises:
        ConfigError: no such data set.
        DataError: it was not fetched, or its files are damaged.
    """
    return look_up("data set", name, READERS)()


def read_digits() -> RawData:
    """scikit-learn's digits: 1,797 pictures of 8x8, no official test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.as_tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)
    return RawData(Arrays(inputs, torch.as_tensor(bunch.target, dtype=torch.int64)), None, 10)


def read_fashion_mnist() -> RawData:
    """Fashion-MNIST: 60,000 + 10,000 pictures of 28x28."""
    folder = files("fashion-mnist")

    def part(prefix: str) -> Arrays:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        return as_arrays(images[:, None], labels)

    return RawData(part("train"), part("t10k"), 10)


def read_cifar10() -> RawData:
    """CIFAR-10 out of six PNG files, each with 10,000 pictures as rows of 32x32x3 values."""
    folder = files("cifar10")

    def part(pictures: list[str], labels: str) -> Arrays:
        rows = np.concatenate([read_png_rows(folder / name) for name in pictures])
        images = rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
        return as_arrays(images, np.asarray(json.loads((folder / labels).read_text()), dtype=np.uint8))

    train = [f"data_batch_{number}.png" for number in range(1, 6)]
    return RawData(part(train, "train_lables.json"), part(["test_batch.png"], "test_lables.json"), 10)


def read_hub_pictures(name: str) -> RawData:
    """Pictures of the Hugging Face hub: CIFAR-100, or SVHN's cropped digits without its easy extra ones."""
    place = hub.HUB_SETS[name]
    (pictures,) = place.inputs

    def part(rows: "Dataset") -> Arrays:
        images = np.stack([np.asarray(picture.convert("RGB")) for picture in rows[pictures]])
        return as_arrays(images.transpose(0, 3, 1, 2), np.asarray(rows[place.label][:]))

    train, test = hub.splits(name, files(name))
    return RawData(part(train), part(test), place.classes)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: two zeros, type 8, number of axes, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an idx file of bytes. Delete its folder and get the data set again.")
    axes = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} holds {values.size} values, but its header says {tuple(map(int, shape))}.")
    return values.reshape(tuple(map(int, shape)))


def read_png_rows(path: Path) -> np.ndarray:
    """Read a PNG whose rows are pictures."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def as_arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Bytes to float32 in 0..1, labels to int64."""
    if len(images) != len(labels):
        raise DataError(f"{len(images)} pictures but {len(labels)} labels. Get the data set again.")
    inputs = torch.from_numpy(np.array(images)).float().div_(255)
    return Arrays(inputs, torch.from_numpy(labels.astype(np.int64)))


READERS: dict[str, Callable[[], RawData]] = {
    "digits": read_digits,
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": partial(read_hub_pictures, "cifar100"),
    "svhn": partial(read_hub_pictures, "svhn"),
}
