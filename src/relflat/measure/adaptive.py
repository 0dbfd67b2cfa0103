"""Sweeps over the data until the error is small enough (``rtol``), by probes or by XTrace."""

import functools
import hashlib
import operator
from collections.abc import Collection

import torch
from torch import Tensor

from relflat.distributed import gathered, kept_whole
from relflat.errors import ConfigError, DataError, NonFiniteError
from relflat.estimate.scene import Scene
from relflat.measure.additivity import Weight
from relflat.measure.sums import Sums
from relflat.measure.sweep import Measurement
from relflat.measure.xtrace import Coordinates, Sketch

MOST = 4096
_FEWEST_FOR_RTOL = 32  # with fewer products some errors by chance look small, and the stop picks those

Images = dict[str, Tensor]


def by_probes(measurement: Measurement, rtol: float | None) -> Sums:
    """One sweep, and more with as many further probes as there were until no error exceeds ``rtol`` of its value.

    Raises:
        ConfigError: if that is out of reach.
    """
    sums = measurement.sweep()
    sums.check()
    while rtol is not None and (short := sums.short_of(rtol)):
        needed = sums.needed(rtol)
        if sums.probes * 2 > MOST or needed > 4 * MOST:  # the prediction is a rough one
            raise ConfigError(
                f"rtol={rtol} is out of reach: after {sums.probes} probes {next(iter(short.values()))}, so it "
                f"takes about {needed:.2g} probes, and {MOST:,} are the most; ask for less, or use "
                "method='xtrace' or 'exact'"
            )
        sums.merge(measurement.sweep(sums.probes, probes=sums.probes))
    return sums


def by_xtrace(measurement: Measurement, rtol: float | None) -> Sums:
    """Kappa of every layer: ``probes`` products each, half of them in each of two sweeps over the data.

    A layer whose operator has no more dimensions than that gets its exact trace. ``Tr H`` is not measured.

    Args:
        measurement: the model, loss and data; ``curvature``, ``probes`` and ``adaptive`` are used.
        rtol: if given, layers whose error is larger are measured anew with twice the products, until none is. There
            are 32 to start with, if ``probes`` are fewer, and the error is widened by what Student's distribution of
            as many estimates is wider than the normal one.

    Raises:
        ConfigError: if ``rtol`` is out of reach.
        DataError: if the data hold nothing, or not the same in each sweep.
        NonFiniteError: if a layer's curvature is not finite.
    """
    options, sketches = measurement.options, dict[str, Sketch]()
    products = options.probes if rtol is None else max(options.probes, _FEWEST_FOR_RTOL)
    sums = _sweep(measurement, sketches, products, None)
    sums.check()
    while True:
        while any(s.pending is not None for s in sketches.values()):
            _sweep(measurement, sketches, products, sums)
        for name, sketch in sketches.items():
            sums.layers[name].settle(sketch.value, sketch.variance, sketch.method(options.curvature))
        widened = {name: sketch.widening for name, sketch in sketches.items()}
        short = {} if rtol is None else sums.short_of(rtol, widened=widened)
        for name, value in short.items():
            products = sketches[name].products * 2
            if products > MOST:
                raise ConfigError(
                    f"rtol={rtol} is out of reach: after {products // 2} products {value}; ask for less, or use "
                    "method='exact'"
                )
            sketches[name] = _sketch(measurement, name, sketches[name].coordinates, products)
        if not short:
            return sums


def _sketch(measurement: Measurement, name: str, coordinates: Coordinates, products: int) -> Sketch:
    """A layer has test vectors of its own: errors of layers are independent."""
    digest = hashlib.blake2b(f"{measurement.estimator.seed},{name}".encode(), digest_size=7).digest()
    return Sketch(coordinates, int.from_bytes(digest, "little"), products)


def _sweep(measurement: Measurement, sketches: dict[str, Sketch], products: int, first: Sums | None) -> Sums:
    """Make the products that the sketches ask for on the data of all ranks; in the first sweep there are none yet."""
    settled = [name for name, s in sketches.items() if s.pending is None]
    wanted, known = sketches.keys() - settled, set(sketches)

    def share() -> tuple[Sums, Images, dict[str, Coordinates]]:
        sums, images = Sums({}, products), Images()
        for scene, weight in measurement.scenes(sums):
            _add_images(measurement, scene, weight, settled, sketches, images, sums)
        return sums, images, {name: sketches[name].coordinates for name in images.keys() - known}

    parts = gathered(share, measurement.group)
    sums = functools.reduce(operator.add, [part[0] for part in parts])
    if first is not None:
        first.must_be_of_the_same(sums, "method='xtrace'")
    total = Images()
    for _, images, coordinates in parts:
        for name in list(images):
            if name not in sketches:
                sketches[name] = _sketch(measurement, name, coordinates[name], products)
            x = images.pop(name)
            total[name] = total[name].add_(x.to(total[name].device)) if name in total else x
    for name in wanted ^ total.keys() if first is not None else ():
        raise DataError(
            f"layer {name!r} took part in one sweep over the data and not in another; give data and a model that "
            "are the same every time, or use method='probe'"
        )
    for name in list(total):
        sketches[name].receive(total.pop(name).to(sketches[name].omega.device))
    return sums


def _add_images(
    measurement: Measurement,
    scene: Scene,
    weight: Weight,
    settled: Collection[str],
    sketches: dict[str, Sketch],
    images: Images,
    sums: Sums,
) -> None:
    """Add a batch's share of the images of all pending columns."""
    device = scene.loss.device.type
    with kept_whole(measurement.model), torch.autocast(device, enabled=False):
        for subject in measurement.estimator.subjects(scene, together=True):
            if subject.layer in settled:
                continue
            operator_, space = subject.operator, subject.space
            name, w = subject.layer, space.weight.detach()
            if name not in sketches:
                coordinates = Coordinates(w, measurement.options.adaptive)
                sketches[name] = _sketch(measurement, name, coordinates, sums.probes)
            sketch = sketches[name]
            assert sketch.pending is not None
            if name not in images:
                images[name] = torch.zeros_like(sketch.pending)
            image = images[name]
            product = functools.partial(space.weight_product, operator_)
            sketch.coordinates.add_images(product, sketch.pending, image, weight[0])
            sums.round_to(w.dtype)
            if not bool(torch.isfinite(image).all()):
                raise NonFiniteError(
                    f"the curvature of layer {name!r} is not finite on a batch, though the loss is: check the "
                    "weights and inputs, and the loss for what has no second derivative (a root or norm at 0)"
                )
    sums.add_loss(scene.loss, *weight)
