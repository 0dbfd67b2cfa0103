"""Kappa as the trace of one operator over all of the data, by XTrace (Epperly, Tropp and Webber 2024).

The estimators of :mod:`relflat.probes` draw other directions for every batch or sample, and their error falls as
the root of the number of products. Here one set of directions serves the whole data set. Half of the products
find the subspace where the operator is large, the other half its trace there, and each direction in turn, left
out of the subspace, samples what is missing. Where the spectrum decays the error falls far faster.
"""

import functools
import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.errors import ConfigError
from relflat.measurement import Measurement
from relflat.penalty import Estimator, Scene, Spec
from relflat.ranks import gathered
from relflat.rng import Rng
from relflat.sharding import kept_whole
from relflat.sums import Sums

Product = Callable[[Tensor], Tensor]


def measure(measurement: Measurement, *, rtol: float | None, most: int) -> Sums:
    """Kappa of every tapped layer: ``spec.probes`` products each, half of them in each of two sweeps over the data.

    A layer whose operator has no more dimensions than that gets its exact trace. ``Tr H`` is not measured.

    Args:
        measurement: the model, loss and data; ``spec.curvature``, ``probes`` and ``adaptive`` are used.
        rtol: if given, layers whose error is larger get twice the products, until none is; products made before
            go on to serve.
        most: largest number of products.

    Raises:
        ConfigError: if ``rtol`` is out of reach.
    """
    sweeps = _Sweeps(measurement)
    sums = sweeps.settle()
    sums.check()
    while True:
        for name, sketch in sweeps.sketches.items():
            sums.layers[name].settle(sketch.value, sketch.variance, sketch.method(measurement.spec))
        short = {} if rtol is None else sums.short_of(rtol)
        if not short:
            return sums
        for name, said in short.items():
            if sweeps.sketches[name].products * 2 > most:
                raise ConfigError(
                    f"rtol={rtol} is out of reach: after {sweeps.sketches[name].products} products {said}; ask for "
                    "less, or use method='exact'"
                )
            sweeps.sketches[name].extend(sweeps.sketches[name].products * 2)
        sweeps.settle()


def check(spec: Spec) -> None:
    """Refuse what XTrace cannot do.

    Raises:
        ConfigError: naming the argument.
    """
    if spec.probes < 4 or spec.probes % 2:
        raise ConfigError(
            f"probes={spec.probes}: XTrace spends products in pairs and needs two pairs for an error; give an even "
            "number from 4 on"
        )


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Coordinates x in R^n of changes of a weight W in which the trace of the curvature is kappa.

    ``kappa = Tr((F (x) I)' H (F (x) I))`` for any F with ``F F' = W W'``: by the definition with F = W, n = m m (I4).
    F from a QR decomposition of W' has min(d, m) columns, so that ``n = min(d, m) m``. If adaptive, x is the
    diagonal of R, and n = m (I9).

    Attributes:
        weight: W, with feature scales if there are any.
        adaptive: whether the adaptive form is meant.
    """

    weight: Float[Tensor, "d m"]
    adaptive: bool

    @functools.cached_property
    def factor(self) -> Float[Tensor, "d k"]:
        """F, in the precision of the weight."""
        return torch.linalg.qr(self.weight.double().mT).R.mT.to(self.weight.dtype)

    @property
    def size(self) -> int:
        """The number of coordinates."""
        d, m = self.weight.shape
        return m if self.adaptive else min(d, m) * m

    def change(self, x: Float[Tensor, " n"]) -> Float[Tensor, "d m"]:
        """The change of W that the coordinates stand for."""
        x = x.to(self.weight.dtype)
        return self.weight * x if self.adaptive else self.factor @ x.reshape(-1, self.weight.shape[1])

    def seen(self, gradient: Float[Tensor, "d m"]) -> Float[Tensor, " n"]:
        """The transpose of :meth:`change`."""
        found = (self.weight * gradient).sum(0) if self.adaptive else self.factor.mT @ gradient
        return found.flatten().double()

    def images(self, product: Product, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The operator on each column: one product with the curvature in the weight a column."""
        return torch.stack([self.seen(product(self.change(column))) for column in x.mT], 1)


class Sketch:
    """What is known of a symmetric operator on R^n from products with it, and its trace by XTrace.

    The products to be made next are those with the columns of ``pending``; :meth:`receive` takes them in.

    Args:
        coordinates: those of the layer.
        seed: of the test vectors, the same on all ranks.
        products: how many to spend; the trace is exact if there are as many as dimensions.

    Memory: ``Omega``, ``Y = A Omega``, ``Q`` with the range of Y and ``Z = A Q`` in float64, n by products / 2 each,
    and two more of this size for the estimates: 24 n bytes a product. For 32 products and 512 x 512 that is 200 MB.
    """

    def __init__(self, coordinates: Coordinates, seed: int, products: int) -> None:
        self.coordinates, self.seed = coordinates, seed
        none = torch.zeros((coordinates.size, 0), dtype=torch.float64, device=coordinates.weight.device)
        self.omega = self.y = self.q = self.z = none
        self.exact = False
        self.pending: Tensor | None = None
        self.extend(products)

    def extend(self, products: int) -> None:
        """Spend more products; the first ones go on to serve."""
        self.products, (n, k) = products, self.omega.shape
        self.exact = products >= n
        if self.exact:
            self.pending = torch.eye(n, dtype=torch.float64, device=self.omega.device)
        else:
            more = self.omega.new_zeros((n, products // 2 - k))
            self.pending = Rng(self.seed, k, shared=True).normal(more)

    def receive(self, images: Float[Tensor, "n k"]) -> None:
        """Take in the operator's images of the pending columns."""
        asked, self.pending = self.pending, None
        assert asked is not None
        if self.exact:
            self._estimates = images.trace()[None]
        elif self.y.shape[1] == self.z.shape[1]:
            self.omega, self.y = torch.cat([self.omega, asked], 1), torch.cat([self.y, images], 1)
            basis = torch.linalg.qr(torch.cat([self.q, images], 1)).Q
            self.pending = basis[:, self.q.shape[1] :]
            self.q = torch.cat([self.q, self.pending], 1)
        else:
            self.z = torch.cat([self.z, images], 1)
            self._estimates = self._leaving_one_out()

    def _leaving_one_out(self) -> Float[Tensor, " k"]:
        """For each test vector w: the trace on the range of the others' images, and w's sample of the rest.

        In the basis Q the range without image i is what is orthogonal to ``s_i``, column i of the inverse transpose
        of ``R = Q' Y``. The part of w outside of it has a uniform direction there, and is given the mean square of
        its length (the normalised form of Epperly et al., section 2).
        """
        n, k = self.omega.shape
        low, inside = self.q.mT @ self.z, self.q.mT @ self.omega
        left, values, right = torch.linalg.svd(self.q.mT @ self.y)
        tiny = torch.finfo(values.dtype)
        # an operator of low rank leaves some directions of Q arbitrary; any of them may be left out
        relative = (values / values[0].clamp_min(tiny.tiny)).clamp_min(tiny.eps)
        s = left @ (right / relative[:, None])
        s = s / torch.linalg.vector_norm(s, dim=0)
        inside = inside - s * (s * inside).sum(0)
        outside = self.omega - self.q @ inside
        energy = (outside * (self.y - self.z @ inside)).sum(0)
        length2 = outside.square().sum(0)
        return low.trace() - (s * (low @ s)).sum(0) + (n - k + 1) * energy / length2

    @property
    def value(self) -> float:
        """The trace."""
        return float(self._estimates.mean())

    @property
    def variance(self) -> float:
        """XTrace's own estimate of its squared error: that of the mean if the estimates were independent.

        They are not quite. On small networks its root mean square was 10 to 25 % below that of the true error, and
        with 8 to 16 products one run in ten was off by more than four times what it reported.
        """
        return 0.0 if self.exact else float(self._estimates.var()) / len(self._estimates)

    def method(self, spec: Spec) -> str:
        """What was done, in words."""
        return "exact" if self.exact else f"xtrace({spec.curvature}, {self.products})"


class _Sweeps:
    """Sweeps over the data of all ranks that make the products the sketches ask for."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement, self.sketches = measurement, dict[str, Sketch]()
        self.estimator = Estimator(measurement.spec, measurement.seed)

    def settle(self) -> Sums:
        """Sweep until no products are pending; the sums of the first sweep."""
        sums = self._sweep()
        while any(s.pending is not None for s in self.sketches.values()):
            self._sweep()
        return sums

    def _sweep(self) -> Sums:
        settled = [name for name, s in self.sketches.items() if s.pending is None]
        parts = gathered(lambda: self._share(settled), self.measurement.group)
        total: dict[str, Tensor] = {}
        for _, images, coordinates in parts:
            for name, x in images.items():
                self._sketch(name, coordinates[name])
                total[name] = total[name] + x.to(total[name].device) if name in total else x
        for name, x in total.items():
            self.sketches[name].receive(x.to(self.sketches[name].omega.device))
        return functools.reduce(operator.add, [sums for sums, _, _ in parts])

    def _share(self, settled: Collection[str]) -> tuple[Sums, dict[str, Tensor], dict[str, Coordinates]]:
        """This rank's data: companions of kappa, images of the pending columns, and what they are of."""
        measurement, images = self.measurement, dict[str, Tensor]()
        sums = Sums({}, measurement.spec.probes)
        for scene, (factor, divisor) in measurement.scenes(sums):
            with self._differentiable(scene):
                for name, weight, product in self.estimator.curvatures(scene, without=settled):
                    sketch = self._sketch(name, Coordinates(weight, measurement.spec.adaptive))
                    assert sketch.pending is not None
                    x = factor * sketch.coordinates.images(product, sketch.pending)
                    images[name] = images[name] + x if name in images else x
            sums.add_loss(scene.loss, factor, divisor)
        return sums, images, {name: self.sketches[name].coordinates for name in images}

    def _sketch(self, name: str, coordinates: Coordinates) -> Sketch:
        if name not in self.sketches:
            spec = self.measurement.spec
            self.sketches[name] = Sketch(coordinates, self.measurement.seed, spec.probes)
        return self.sketches[name]

    @contextmanager
    def _differentiable(self, scene: Scene) -> Iterator[None]:
        with kept_whole(self.measurement.model), torch.autocast(scene.loss.device.type, enabled=False):
            yield
