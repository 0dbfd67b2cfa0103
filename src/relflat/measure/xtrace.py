"""Kappa as the trace of one operator over all of the data, by XTrace (Epperly, Tropp and Webber 2024).

The estimators of :mod:`relflat.estimate.probes` draw other directions for every batch or sample,
and their error falls as the root of the number of products. Here one set of directions
serves the whole data set. Half of the products find the subspace where the operator is large, the other half its
trace there, and each direction in turn, left out of
the subspace, samples what is missing. Where the spectrum decays the error falls far faster.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.distributed import gathered
from relflat.errors import ConfigError, DataError, NonFiniteError
from relflat.estimate.choose import Estimator, Scene, Spec
from relflat.measure.sums import Sums
from relflat.measure.sweep import Measurement
from relflat.rng import Rng
from relflat.sharding import kept_whole

Product = Callable[[Tensor], Tensor]
_FEWEST_FOR_RTOL = 32  # with fewer products some errors by chance look small, and the stop picks those


def measure(measurement: Measurement, *, rtol: float | None, most: int) -> Sums:
    """Kappa of every tapped layer: ``spec.probes`` products each, half of them in each of two sweeps over the data.

    A layer whose operator has no more dimensions than that gets its exact trace. ``Tr H`` is not measured.

    Args:
        measurement: the model, loss and data; ``spec.curvature``, ``probes`` and ``adaptive`` are used.
        rtol: if given, layers whose error is larger get twice the products, until none is; products made before
            go on to serve. There are 32 to start with, if ``spec.probes`` are fewer, and the error is widened by
            what Student's distribution of as many estimates is wider than the normal one.
        most: largest number of products.

    Raises:
        ConfigError: if ``rtol`` is out of reach.
        DataError: if the data hold nothing, or not the same in each sweep.
        NonFiniteError: if a layer's curvature is not finite.
    """
    probes = measurement.spec.probes
    sweeps = _Sweeps(measurement, probes if rtol is None else max(probes, _FEWEST_FOR_RTOL))
    sums = sweeps.settle()
    while True:
        for name, sketch in sweeps.sketches.items():
            sums.layers[name].settle(sketch.value, sketch.variance, sketch.method(measurement.spec))
        widened = {name: sketch.widening for name, sketch in sweeps.sketches.items()}
        short = {} if rtol is None else sums.short_of(rtol, widened=widened)
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
        return self.add_images(product, x, torch.zeros_like(x))

    def add_images(
        self, product: Product, x: Float[Tensor, "n k"], onto: Float[Tensor, "n k"], factor: float = 1.0
    ) -> Float[Tensor, "n k"]:
        """The same times a factor, added to ``onto`` in place."""
        for column, total in zip(x.mT, onto.mT, strict=True):
            total.add_(self.seen(product(self.change(column))), alpha=factor)
        return onto


class Sketch:
    """What is known of a symmetric operator on R^n from products with it, and its trace by XTrace.

    The products to be made next are those with the columns of ``pending``; :meth:`receive` takes them in.

    Args:
        coordinates: those of the layer.
        seed: of the test vectors, the same on all ranks.
        products: how many to spend; the trace is exact if there are as many as dimensions.

    Memory: ``Omega``, ``Q`` with the range of ``Y = A Omega`` and ``Z = A Q`` in float64, n by products / 2 each:
    12 n bytes a product are kept, and at most 18 n are in use (21 n while products are doubled). For 32 products
    and 512 x 512 a peak of 147 MB was measured.
    """

    def __init__(self, coordinates: Coordinates, seed: int, products: int) -> None:
        self.coordinates, self.seed = coordinates, seed
        none = torch.zeros((coordinates.size, 0), dtype=torch.float64, device=coordinates.weight.device)
        self.omega = self.q = self.z = none
        self.r = none.new_zeros((0, 0))  # Q' Y, so that Y = Q R
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
            more = self.omega.new_zeros(()).expand(n, products // 2 - k)
            self.pending = Rng(self.seed, k, shared=True).normal(more)

    def receive(self, images: Float[Tensor, "n k"]) -> None:
        """Take in the operator's images of the pending columns."""
        assert self.pending is not None
        if self.exact:
            self._estimates, self.pending = images.trace()[None], None
        elif self.r.shape[1] == self.z.shape[1]:
            self.omega, self.pending = _beside(self.omega, self.pending), None
            self._span(images)
        else:
            self.pending = None
            self.z = _beside(self.z, images)
            self._estimates = self._leaving_one_out()

    def _span(self, images: Float[Tensor, "n k"]) -> None:
        """Widen Q by the range of new images, and ask for those of its new columns."""
        old = self.q.shape[1]
        basis = torch.linalg.qr(_beside(self.q, images)).Q
        # the old columns come out with either sign, and Z holds the images of those that were asked for
        basis[:, :old] = self.q
        self.q = basis
        r = basis.new_zeros((basis.shape[1], basis.shape[1]))
        r[:old, :old], r[:, old:] = self.r, basis.mT @ images
        self.r, self.pending = r, basis[:, old:]

    def _leaving_one_out(self) -> Float[Tensor, " k"]:
        """For each test vector w: the trace on the range of the others' images, and w's sample of the rest.

        In the basis Q the range without image i is what is orthogonal to ``s_i``, column i of the inverse transpose
        of ``R = Q' Y``. The part of w outside of it has a uniform direction there, and is given the mean square of
        its length (the normalised form of Epperly et al., section 2).
        """
        n, k = self.omega.shape
        low, across, along = self.q.mT @ self.z, self.omega.mT @ self.z, self.q.mT @ self.omega
        left, values, right = torch.linalg.svd(self.r)
        tiny = torch.finfo(values.dtype)
        # an operator of low rank leaves some directions of Q arbitrary; any of them may be left out
        relative = (values / values[0].clamp_min(tiny.tiny)).clamp_min(tiny.eps)
        s = left @ (right / relative[:, None])
        s = s / torch.linalg.vector_norm(s, dim=0)
        inside = along - s * (s * along).sum(0)
        # of w - Q inside: its product with A (w - Q inside) and its square, by inner products of k columns
        energy = ((along - inside) * self.r).sum(0) - ((across.mT - low.mT @ inside) * inside).sum(0)
        length2 = self.omega.square().sum(0) - inside.square().sum(0)
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

    @property
    def widening(self) -> float:
        """How much wider Student's distribution of that many estimates is than the normal one."""
        k = len(self._estimates)
        return 1.0 if self.exact else math.sqrt((k - 1) / (k - 3)) if k > 3 else math.inf

    def method(self, spec: Spec) -> str:
        """What was done, in words."""
        return "exact" if self.exact else f"xtrace({spec.curvature}, {self.products})"


def _beside(one: Float[Tensor, "n j"], two: Float[Tensor, "n k"]) -> Float[Tensor, "n l"]:
    """The columns of both; the second itself, where the first has none."""
    return torch.cat([one, two], 1) if one.shape[1] else two


class _Sweeps:
    """Sweeps over the data of all ranks that make the products the sketches ask for.

    Args:
        measurement: the model, loss and data.
        products: how many each sketch starts with.
    """

    def __init__(self, measurement: Measurement, products: int) -> None:
        self.measurement, self.products = measurement, products
        self.sketches: dict[str, Sketch] = {}
        self.estimator = Estimator(measurement.spec, measurement.seed)
        self._first: Sums | None = None

    def settle(self) -> Sums:
        """Sweep until no products are pending; the sums of the first sweep.

        Raises:
            DataError: if there are no data, or a sweep sees others than the first.
        """
        if self._first is None:
            self._first = self._sweep()
            self._first.check()
        while any(s.pending is not None for s in self.sketches.values()):
            self._sweep()
        return self._first

    def _sweep(self) -> Sums:
        settled = [name for name, s in self.sketches.items() if s.pending is None]
        wanted = self.sketches.keys() - settled
        parts = gathered(lambda: self._share(settled), self.measurement.group)
        sums = functools.reduce(operator.add, [sums for sums, _, _ in parts])
        if self._first is not None:
            self._first.must_be_of_the_same(sums, "method='xtrace'")
        total: dict[str, Tensor] = {}
        for _, images, coordinates in parts:
            for name in list(images):
                if name not in self.sketches:
                    self._add_sketch(name, coordinates[name])
                x = images.pop(name)
                total[name] = total[name].add_(x.to(total[name].device)) if name in total else x
                del x
        self._must_be_of(wanted, total)
        for name in list(total):
            device = self.sketches[name].omega.device
            self.sketches[name].receive(total.pop(name).to(device))
        return sums

    def _share(self, settled: Collection[str]) -> tuple[Sums, dict[str, Tensor], dict[str, Coordinates]]:
        """This rank's data: companions of kappa, images of the pending columns, and what new ones are of."""
        measurement, images, known = self.measurement, dict[str, Tensor](), set(self.sketches)
        sums = Sums({}, self.products)
        for scene, (factor, divisor) in measurement.scenes(sums):
            with self._differentiable(scene):
                for name, weight, product in self.estimator.curvatures(scene, without=settled):
                    if name not in self.sketches:
                        self._add_sketch(name, Coordinates(weight, measurement.spec.adaptive))
                    pending = self.sketches[name].pending
                    assert pending is not None
                    if name not in images:
                        images[name] = torch.zeros_like(pending)
                    self.sketches[name].coordinates.add_images(product, pending, images[name], factor)
                    sums.round_to(weight.dtype)
                    _check_finite(name, images[name])
            sums.add_loss(scene.loss, factor, divisor)
        return sums, images, {name: self.sketches[name].coordinates for name in images.keys() - known}

    def _must_be_of(self, wanted: Collection[str], found: Collection[str]) -> None:
        """Refuse a later sweep in which other layers took part."""
        for name in set(wanted) ^ set(found) if self._first is not None else ():
            raise DataError(
                f"layer {name!r} took part in one sweep over the data and not in another; give data and a model that "
                "are the same every time, or use method='probe'"
            )

    def _add_sketch(self, name: str, coordinates: Coordinates) -> None:
        """Begin a layer, with test vectors of its own: errors of layers are independent."""
        digest = hashlib.blake2b(f"{self.measurement.seed},{name}".encode(), digest_size=7).digest()
        self.sketches[name] = Sketch(coordinates, int.from_bytes(digest, "little"), self.products)

    @contextmanager
    def _differentiable(self, scene: Scene) -> Iterator[None]:
        with kept_whole(self.measurement.model), torch.autocast(scene.loss.device.type, enabled=False):
            yield


def _check_finite(name: str, images: Tensor) -> None:
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError(
            f"the curvature of layer {name!r} is not finite on a batch, though the loss is: check the weights and "
            "inputs, and the loss for what has no second derivative (a root or norm at 0)"
        )
