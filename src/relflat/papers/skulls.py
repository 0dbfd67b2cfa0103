"""Deformations of one real head CT, a piece of each vault removed: the skulls of the reconstruction task.

Public sets of skulls are behind registrations, so this one is made from the one CT that a Debian package
carries. Every sample is that skull stretched, turned, shifted and smoothly bent, on a grid of 48^3 voxels; a
rough ellipsoid is cut out of its vault. The network sees the rest and is asked for the whole. It says something
about learning shapes; it says nothing about the variety of real skulls.
"""

import hashlib
import io
import json
import plistlib
import tarfile
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from relflat.errors import ConfigError, DataError
from relflat.lab.data.arrays import Arrays
from relflat.lab.data.fetch import cache_folder, files
from relflat.lab.data.sources import SOURCES
from relflat.lab.data.splits import Splits, subset
from relflat.lab.train.store import put_in_place

PROJECT = "Cranium.inv3"
SIDE = 48  # voxels
SPACING = 4.5  # mm from voxel to voxel
BONE = 226  # Hounsfield units: the threshold of the project's own bone mask
FINE = 2.0  # mm: what the CT is resampled to
SEED = 20261124  # of the skulls; the seed of a run never changes one
VERSION = 1  # of the recipe: raised whenever the same numbers would give other skulls
SMALL, LARGE = (4.0, 8.0), (7.0, 11.0)  # least and greatest half-axis of a defect, voxels

Mask = np.ndarray


@dataclass(frozen=True)
class Sizes:
    """How many skulls there are of each split; both evaluation sets have ``evaluation``, and share them."""

    train: int = 100
    validation: int = 40
    evaluation: int = 50


class Scan(NamedTuple):
    """A skull cut free from a CT."""

    hounsfield: np.ndarray  # int16 (z, y, x), z upwards and y to the face; 0 away from the skull
    spacing: tuple[float, float, float]  # mm from voxel to voxel along each axis
    centre: np.ndarray  # of the skull's bounding box, in voxels


class Skulls(NamedTuple):
    """What is kept of the whole set; masks of shape (n, 48, 48, 48)."""

    complete: Mask
    defective: Mask  # the same skulls, each with a defect
    other: Mask  # the last ``Sizes.evaluation`` of them once more, with larger defects


def read_project(path: Path) -> Scan:
    """Cut free the skull of an InVesalius project, a gzipped tar file of ``main.plist`` and the volume it names."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            contents = {Path(each.name).name: file.read() for each in archive if (file := archive.extractfile(each))}
        description = plistlib.loads(contents["main.plist"])
        matrix = description["matrix"]
        volume = np.frombuffer(contents[matrix["filename"]], dtype=matrix["dtype"]).reshape(matrix["shape"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, tarfile.TarError) as error:
        raise DataError(
            f"{path} is not an InVesalius project with a volume ({error}). Delete its folder and get it again "
            f"with: {SOURCES['skulls'].command}"
        ) from error
    x, y, z = description["spacing"]
    return cut_free(volume, (z, y, x))


def cut_free(volume: np.ndarray, spacing: tuple[float, float, float]) -> Scan:
    """Keep the largest connected piece of bone with the voxel next to it; everything else becomes 0 HU."""
    skull = largest_piece(volume >= BONE)
    if not skull.any():
        raise DataError(f"The CT has no voxel of {BONE} HU or more, so there is no bone in it.")
    box = ndimage.find_objects(skull.astype(np.int8))[0]
    centre = np.array([(side.start + side.stop - 1) / 2 for side in box])
    return Scan(np.where(ndimage.binary_dilation(skull), volume, 0).astype(np.int16), spacing, centre)


def largest_piece(mask: Mask) -> Mask:
    """The largest connected piece of a mask; all of it where it is empty."""
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())[1:]
    return pieces == 1 + sizes.argmax() if len(sizes) else mask


def resampled(scan: Scan, spacing: float = FINE) -> Scan:
    """The scan on a cubic grid, smoothed first by what the coarser grids cannot show (deviation 2 mm)."""
    factors = np.asarray(scan.spacing) / spacing
    smooth = ndimage.gaussian_filter(scan.hounsfield.astype(np.float32), 2.0 / np.asarray(scan.spacing))
    shape = np.ceil(np.array(smooth.shape) * factors).astype(int)
    values = ndimage.affine_transform(smooth, 1 / factors, output_shape=tuple(shape), order=1)
    return Scan(values.astype(np.int16), (spacing,) * 3, scan.centre * factors)


def smooth_field(random: Generator, knots: int, side: int) -> np.ndarray:
    """A field of unit deviation at ``knots^3`` knots, cubic in between; shape (side, side, side)."""
    return ndimage.zoom(random.standard_normal((knots,) * 3), side / knots, order=3, mode="nearest")


def rotation(angles: np.ndarray) -> np.ndarray:
    """The rotation matrix about the three axes in turn, angles in radians."""
    return Rotation.from_euler("XYZ", angles).as_matrix()


def deformed(scan: Scan, random: Generator) -> Mask:
    """One complete skull on the grid.

    Each axis is scaled by .85 to 1.12, the whole is turned by angles of deviation .06 rad and shifted by at most
    4 mm, bent by a displacement of deviation 4.4 mm at 5^3 knots, and cut at 120 to 260 HU.
    """
    scale = random.uniform(0.85, 1.12, 3)
    turn = rotation(random.normal(0, 0.06, 3))
    shift = random.uniform(-4, 4, 3)
    bend = np.stack([4.4 * smooth_field(random, 5, SIDE) for _ in range(3)])
    grid = SPACING * (np.indices((SIDE,) * 3) - (SIDE - 1) / 2)
    place = (grid + bend - shift[:, None, None, None]).reshape(3, -1)
    inside = (turn.T @ place) / (scale * scan.spacing)[:, None] + scan.centre[:, None]
    values = ndimage.map_coordinates(scan.hounsfield, inside, output=np.float32, order=1, cval=0)
    return (values >= random.uniform(120, 260)).reshape((SIDE,) * 3)


def defect(complete: Mask, random: Generator, radii: tuple[float, float]) -> Mask:
    """What is removed of a skull: its voxels inside a rough ellipsoid around one in the upper half."""
    height = np.flatnonzero(complete.any((1, 2)))
    vault = np.argwhere(complete)
    vault = vault[vault[:, 0] >= (height[0] + height[-1]) / 2]
    centre = vault[random.integers(len(vault))]
    place = (np.indices(complete.shape) - centre[:, None, None, None]).reshape(3, -1)
    axes = rotation(random.uniform(0, np.pi, 3)) @ place
    distance = np.sqrt(((axes / random.uniform(*radii, 3)[:, None]) ** 2).sum(0)).reshape(complete.shape)
    return complete & (distance < 1 + 0.15 * smooth_field(random, 8, SIDE))


def make(scan: Scan, sizes: Sizes, seed: int = SEED) -> Skulls:
    """Make the whole set; sample ``i`` is a function of the scan, the seed and ``i`` alone. Cost: .1 s a skull."""
    fine = resampled(scan)
    first = sizes.train + sizes.validation
    complete, defective, other = [], [], []
    for number in range(first + sizes.evaluation):
        skull = deformed(fine, default_rng([seed, number]))
        complete.append(skull)
        defective.append(skull & ~defect(skull, default_rng([seed, number, 1]), SMALL))
        if number >= first:
            other.append(skull & ~defect(skull, default_rng([seed, number, 2]), LARGE))
    return Skulls(np.stack(complete), np.stack(defective), np.stack(other))


def kept(sizes: Sizes) -> Path:
    """Where the set of these sizes is, or would be, in the cache."""
    recipe = {"source": SOURCES["skulls"].sha256, "seed": SEED, "version": VERSION, **asdict(sizes)}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"skulls-made-{digest[:12]}.npz"


def skulls(sizes: Sizes) -> Skulls:
    """The set of these sizes: made once, then read from the cache; an error where the CT was not fetched."""
    path = kept(sizes)
    if not path.is_file():
        write(path, make(read_project(files("skulls") / PROJECT), sizes))
    return read(path)


def write(path: Path, made: Skulls) -> None:
    """Write the set, one bit a voxel, so that the file is there whole or not at all."""
    bits = io.BytesIO()
    complete, defective, other = map(np.packbits, made)
    np.savez_compressed(bits, complete=complete, defective=defective, other=other)
    put_in_place(path, lambda temporary: temporary.write_bytes(bits.getvalue()))


def read(path: Path) -> Skulls:
    """Read what ``write`` wrote."""
    try:
        with np.load(path) as bits:
            masks = [np.unpackbits(bits[name]).astype(bool) for name in Skulls._fields]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it; it is made again when needed.") from error
    return Skulls(*(mask.reshape(-1, SIDE, SIDE, SIDE) for mask in masks))


@cache
def arrays(sizes: Sizes) -> tuple[Arrays, Arrays]:
    """All skulls as (defective, complete), float32 of shape (n, 1, 48, 48, 48), and the second evaluation set."""
    made = skulls(sizes)
    complete = _tensor(made.complete)
    return Arrays(_tensor(made.defective), complete), Arrays(_tensor(made.other), complete[-sizes.evaluation :])


def _tensor(mask: Mask) -> Tensor:
    return torch.from_numpy(mask[:, None].astype(np.float32))


def splits(*, train_size: int | None, label_noise: float, seed: int, sizes: Sizes = Sizes()) -> Splits:
    """Training, validation and the two evaluation sets: the same skulls with small and with large defects."""
    if label_noise != 0:
        raise ConfigError(f"label_noise={label_noise}: the targets are shapes, not labels; leave it out.")
    everything, other = arrays(sizes)
    train = subset(torch.arange(sizes.train), train_size, torch.Generator().manual_seed(seed))
    first = sizes.train + sizes.validation
    return Splits(
        train=everything.take(train),
        validation=everything.take(slice(sizes.train, first)),
        test=lambda: everything.take(slice(first, None)),
        shifts={"larger-defects": lambda: other},
    )
