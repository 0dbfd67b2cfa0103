"""Readers: the files of a data set become arrays of pictures and labels; each is given its source and folder."""

import gzip
import json
from pathlib import Path

import numpy as np
import torch

from relflat.errors import DataError
from relflat.lab.data.arrays import Arrays, RawData
from relflat.lab.data.mnist1d import generate
from relflat.lab.data.sources import Source


def digits(source: Source, folder: Path) -> RawData:
    """scikit-learn's digits: 1,797 pictures of 8x8, no official test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.as_tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)
    return RawData(Arrays(inputs, torch.as_tensor(bunch.target, dtype=torch.int64)), None, 10)


def fashion_mnist(source: Source, folder: Path) -> RawData:
    """Fashion-MNIST: 60,000 + 10,000 pictures of 28x28."""

    def part(prefix: str) -> Arrays:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        return as_arrays(images[:, None], read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"))

    return RawData(part("train"), part("t10k"), 10)


def cifar10(source: Source, folder: Path) -> RawData:
    """CIFAR-10 out of six PNG files, each with 10,000 pictures as rows of 32x32x3 values."""
    from PIL import Image

    def part(pictures: list[str], labels: str) -> Arrays:
        rows = np.concatenate([np.asarray(Image.open(folder / name).convert("RGB")) for name in pictures])
        images = rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
        return as_arrays(images, np.asarray(json.loads((folder / labels).read_text("utf-8")), dtype=np.uint8))

    train = [f"data_batch_{number}.png" for number in range(1, 6)]
    return RawData(part(train, "train_lables.json"), part(["test_batch.png"], "test_lables.json"), 10)


def hub_pictures(source: Source, folder: Path) -> RawData:
    """Pictures of the Hugging Face hub, as `relflat.lab.data.hub.save` wrote them."""
    train, test = (
        as_arrays(np.load(folder / f"{split}-images.npy"), np.load(folder / f"{split}-labels.npy"))
        for split in source.rows
    )
    return RawData(train, test, source.classes)


def mnist1d(source: Source, folder: Path) -> RawData:
    """MNIST-1D as its authors make it by default: inputs (n, 1, 40) of mean 0 and deviation 1."""
    signals, labels = generate()
    samples = Arrays(torch.from_numpy(signals).float().unsqueeze(1), torch.from_numpy(labels))
    return RawData(samples.take(slice(4000)), samples.take(slice(4000, None)), 10)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: two zeros, type 8, number of axes, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an idx file of bytes. Delete its folder and get the data set again.")
    axes = content[3]
    shape = tuple(map(int, np.frombuffer(content, dtype=">u4", count=axes, offset=4)))
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} holds {values.size} values, but its header says {shape}.")
    return values.reshape(shape)


def as_arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Bytes to float32 in 0..1, labels to int64."""
    if len(images) != len(labels):
        raise DataError(f"{len(images)} pictures but {len(labels)} labels. Get the data set again.")
    inputs = torch.from_numpy(np.array(images)).float().div_(255)
    return Arrays(inputs, torch.from_numpy(labels.astype(np.int64)))
