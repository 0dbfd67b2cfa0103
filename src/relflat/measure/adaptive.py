"""Sweeps over the data until the error is small enough (``rtol``), by probes or by XTrace."""

import functools
import math
from collections.abc import Set as AbstractSet

import torch

from relflat.errors import ConfigError, DataError, NonFiniteError, SecondDerivativeError
from relflat.estimate.scene import Scene
from relflat.estimate.subject import Subject
from relflat.measure.sums import Sum, Sums
from relflat.measure.sweep import Measurement
from relflat.measure.xtrace import Coordinates, Sketch
from relflat.rng import hashed

MOST = 4096
_FEWEST_FOR_RTOL = 32  # with fewer products some errors by chance look small, and the stop picks those


def by_probes(measurement: Measurement, rtol: float | None) -> Sums:
    """One sweep, and more with as many further probes as there were until no error exceeds ``rtol`` of its value."""
    sums = measurement.sweep(functools.partial(measurement.estimate, 0), measurement.estimator.options.probes)
    while rtol is not None and (short := sums.short_of(rtol)):
        needed = sums.needed(rtol)
        if sums.probes * 2 > MOST or needed > 4 * MOST:  # the prediction is a rough one
            raise ConfigError(
                f"rtol={rtol} is out of reach: after {sums.probes} probes {next(iter(short.values()))}, so it "
                f"takes about {needed:.2g} probes, and {MOST:,} are the most; ask for less, or use "
                "method='xtrace' or 'exact'"
            )
        sums.merge(measurement.sweep(functools.partial(measurement.estimate, sums.probes), sums.probes))
    return sums


def by_xtrace(measurement: Measurement, rtol: float | None) -> Sums:
    """Kappa of every layer: ``probes`` products each, half of them in each of two sweeps over the data.

    A layer whose operator has no more dimensions than that gets its exact trace. ``Tr H`` is not measured. With
    ``rtol`` there are 32 products or more, and layers whose error is larger are measured anew with twice the
    products, until none is.
    """
    options, estimator = measurement.estimator.options, measurement.estimator
    products = options.probes if rtol is None else max(options.probes, _FEWEST_FOR_RTOL)
    sketches: dict[str, Sketch] = {}
    try:
        sums = _sweep(measurement, sketches, products, None)
    except SecondDerivativeError as error:
        if estimator.plain:
            raise
        estimator.go_plain(error)
        return by_xtrace(measurement, rtol)
    while True:
        while any(s.pending is not None for s in sketches.values()):
            _sweep(measurement, sketches, products, sums)
        for name, s in sketches.items():
            x = sums.layers[name]
            x.kappa, x.trace = Sum(s.value, s.variance), Sum(math.nan, math.nan)
            x.method, x.exact = s.method(options.curvature), s.exact
        short = {} if rtol is None else sums.short_of(rtol)
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
    return Sketch(coordinates, hashed(f"{measurement.estimator.seed},{name}"), products)


def _sweep(measurement: Measurement, sketches: dict[str, Sketch], products: int, first: Sums | None) -> Sums:
    """Make the products that the sketches ask for on the data of all ranks; the first sweep makes the sketches."""
    wanted = {name for name, s in sketches.items() if s.pending is not None}

    def look(i: int, scene: Scene, factor: float, sums: Sums) -> None:
        for subject in measurement.estimator.subjects(scene, together=True):
            name = subject.layer
            if name not in sketches:
                c = Coordinates(subject.space.weight.detach(), measurement.estimator.options.adaptive)
                sums.layers[name].coordinates, sketches[name] = c, _sketch(measurement, name, c, products)
            if sketches[name].pending is not None:
                _add_images(sketches[name], subject, factor, sums)

    sums = measurement.sweep(look, products)
    images = {name: x.image for name, x in sums.layers.items() if x.image is not None}
    if first is not None:
        first.must_be_of_the_same(sums, "method='xtrace'")
        _must_be_of(wanted, images.keys())
    for name in list(images):
        x = sums.layers[name]
        if name not in sketches:  # it took part on another rank only
            assert x.coordinates is not None
            sketches[name] = _sketch(measurement, name, x.coordinates, products)
        x.image = x.coordinates = None
        sketches[name].receive(images.pop(name).to(sketches[name].omega.device))
    return sums


def _must_be_of(wanted: AbstractSet[str], found: AbstractSet[str]) -> None:
    for name in wanted ^ found:
        raise DataError(
            f"layer {name!r} took part in one sweep over the data and not in another; give data and a model that "
            "are the same every time, or use method='probe'"
        )


def _add_images(sketch: Sketch, subject: Subject, factor: float, sums: Sums) -> None:
    """Add a batch's share of the images of all pending columns: one product in the weight a column."""
    x, columns, coordinates = sums.layers[subject.layer], sketch.pending, sketch.coordinates
    assert columns is not None
    x.image = torch.zeros_like(columns) if x.image is None else x.image
    for column, total in zip(columns.mT, x.image.mT, strict=True):
        product = subject.space.weight_product(subject.operator, coordinates.change(column))
        total.add_(coordinates.seen(product), alpha=factor)
    sums.round_to(subject.space.weight.dtype)
    if not bool(torch.isfinite(x.image).all()):
        raise NonFiniteError(
            f"the curvature of layer {subject.layer!r} is not finite on a batch, though the loss is: check the "
            "weights and inputs, and the loss for what has no second derivative (a root or norm at 0)"
        )
