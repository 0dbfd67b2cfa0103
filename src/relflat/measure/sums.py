"""Running sums of a measurement over batches, ranks and probes, and the results made of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.errors import DataError, NonFiniteError
from relflat.estimate.contributions import Values
from relflat.measure.xtrace import Coordinates
from relflat.options import Curvature
from relflat.result import Flatness


@dataclass(frozen=True)
class Sum:
    """A sum over the data with the variance of its error, as probes are independent; nan for what is not known."""

    value: float = 0.0
    variance: float = 0.0
    bias: float = 0.0  # what more probes do not make smaller
    doubt: float = 0.0  # what to add to the variance, times the variance, as that is not well known

    @classmethod
    def of(
        cls, values: Values | None, *, exact: bool, variances: Float[Tensor, " g"] | None = None, bias: float = 0.0
    ) -> "Sum":
        """The sum over groups of the mean over probes; variances from the spread over probes, if they are not given.

        The variance is low where the value is: a single direction of curvature, the hardest case, has shares that
        are chi squared of one degree of freedom. So is what is made of images then, and the spread is worse. Both
        doubts, which many groups make small, are such that about one in a thousand is beyond four errors
        (benchmarks/calibration.py).
        """
        if values is None:
            return cls(math.nan, math.nan)
        v = values.detach().double()
        k, value = v.shape[0], float(v.mean(0).sum())
        if exact or k == 1:
            return cls(value, 0.0 if exact else math.nan, bias)
        doubt = 64 / k**2 if variances is not None else 30 / (k - 1)
        each = v.var(0) / k if variances is None else variances
        return cls(value, float(each.sum()), bias, doubt * float(each.square().sum()))

    @property
    def error(self) -> float:
        """The standard error."""
        if math.isnan(self.variance):
            return math.nan
        more = self.doubt / self.variance if self.variance > 0 else 0.0
        return math.hypot(math.sqrt(max(self.variance, 0.0) + more), self.bias)

    def __add__(self, other: "Sum") -> "Sum":
        bias, doubt = self.bias + other.bias, self.doubt + other.doubt
        return Sum(self.value + other.value, self.variance + other.variance, bias, doubt)

    def __mul__(self, factor: float) -> "Sum":
        variance, bias, doubt = self.variance * factor**2, self.bias * abs(factor), self.doubt * factor**4
        return Sum(self.value * factor, variance, bias, doubt)


def no_data(samples: int) -> DataError:
    """What to say of data with nothing to measure on: no sample, or none that counts."""
    return DataError(
        "the data holds no target that counts: every one is ignored (ignore_index)"
        if samples
        else "the data is empty: no batch to measure on (an iterator that was used up?)"
    )


@dataclass
class LayerSums:
    """Running sums for one layer, in float64, each already weighted as the whole loss is."""

    kappa: Sum = Sum()
    trace: Sum = Sum()
    energy: float = 0.0
    weight_norm: float = 0.0
    method: str = ""
    exact: bool = True
    image: Tensor | None = None  # of the columns that a sketch asks for
    coordinates: Coordinates | None = None  # of the image, the first time

    def __add__(self, other: "LayerSums") -> "LayerSums":
        """The sums over both parts of the data, each of their methods named once."""
        methods = (*self.method.split(", "), *other.method.split(", "))
        return LayerSums(
            self.kappa + other.kappa,
            self.trace + other.trace,
            self.energy + other.energy,
            self.weight_norm or other.weight_norm,
            ", ".join(dict.fromkeys(filter(None, methods))),
            self.exact and other.exact,
            image=self._image_with(other.image),
            coordinates=self.coordinates or other.coordinates,
        )

    def _image_with(self, other: Tensor | None) -> Tensor | None:
        if self.image is None:
            return other
        return self.image if other is None else self.image.add_(other.to(self.image.device))


@dataclass(frozen=True)
class Moments:
    """How many rows of features there were, their mean, summed squared deviations from it, and their dtype."""

    count: int
    mean: Float[Tensor, " m"]
    squares: Float[Tensor, " m"]
    dtype: torch.dtype

    @classmethod
    def of(cls, features: Float[Tensor, "n m"]) -> "Moments":
        """Those of some rows, in float64."""
        phi = features.double()
        return cls(phi.shape[0], phi.mean(0), phi.var(0, correction=0) * phi.shape[0], features.dtype)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both parts together (Chan et al. 1983), where those of the first are."""
        count, delta = self.count + other.count, other.mean.to(self.mean.device) - self.mean
        between = delta.square() * self.count * other.count / count
        squares = self.squares + other.squares.to(self.squares.device) + between
        return Moments(count, self.mean + delta * other.count / count, squares, self.dtype)


ByLayer = TypeVar("ByLayer", LayerSums, Moments)


def added(one: Mapping[str, ByLayer], two: Mapping[str, ByLayer]) -> dict[str, ByLayer]:
    """What either has by layer, and the sum of what both have."""
    return {**one, **two, **{name: one[name] + two[name] for name in one if name in two}}


@dataclass
class Sums:
    """What a sweep over the data adds up; sums of ranks or of other cuts of the data are added up too."""

    layers: dict[str, LayerSums]
    probes: int
    loss: float = 0.0
    confidence: float = 0.0
    confident: int = 0  # rows that have a confidence and are not ignored
    samples: int = 0
    weight: float = 0.0  # what a mean reduction divides by, or 0 for sums
    batches: int = 0
    rounding: float = 0.0  # relative, of the coarsest numbers that went in

    def __add__(self, other: "Sums") -> "Sums":
        """The sums over both parts of the data, of the same number of probes."""
        return Sums(
            added(self.layers, other.layers),
            self.probes,
            self.loss + other.loss,
            self.confidence + other.confidence,
            self.confident + other.confident,
            self.samples + other.samples,
            self.weight + other.weight,
            self.batches + other.batches,
            max(self.rounding, other.rounding),
        )

    def add_loss(self, loss: Tensor, factor: float, divisor: float) -> None:
        """Count a batch, with what its loss is multiplied by and what it adds to the divisor of the sum."""
        self.loss += factor * float(loss.detach().sum())
        self.weight, self.batches = self.weight + divisor, self.batches + 1
        self.round_to(loss.dtype)

    def round_to(self, dtype: torch.dtype) -> None:
        """Take note that numbers of this precision went in."""
        self.rounding = max(self.rounding, torch.finfo(dtype).eps)

    def _over_all(self, total: Sum) -> Sum:
        return total * (1 / (self.weight or 1.0))

    # -- errors ----------------------------------------------------------------------------------------------

    def short_of(self, rtol: float) -> dict[str, str]:
        """The layers whose error exceeds ``rtol`` of the value, each with its value and error in words."""
        kappas = {name: self._over_all(x.kappa) for name, x in self.layers.items() if not x.exact}
        return {
            name: f"kappa({name}) = {kappa.value:.4g} ± {kappa.error:.2g}"
            for name, kappa in kappas.items()
            if not kappa.error <= rtol * abs(kappa.value)
        }

    def needed(self, rtol: float) -> float:
        """How many probes ``rtol`` asks for at least, as the error falls with their root.

        A value may be larger than it was found by two errors, and is taken to be.
        """
        kappas = [x.kappa for x in self.layers.values() if not x.exact and x.kappa.variance > 0]
        share = max((k.error / (abs(k.value) + 2 * k.error) for k in kappas), default=0.0)
        return self.probes * (share / rtol) ** 2

    def merge(self, other: "Sums") -> None:
        """Average with a sweep that used other probes, by number of probes."""
        self.must_be_of_as_many(other, "rtol")
        probes = self.probes + other.probes
        for name, x in self.layers.items():
            y, a, b = other.layers[name], self.probes / probes, other.probes / probes
            x.kappa, x.trace = x.kappa * a + y.kappa * b, x.trace * a + y.trace * b
            x.method = x.method.replace(f"{self.probes})", f"{probes})")
        self.probes = probes

    # -- refusals --------------------------------------------------------------------------------------------

    def must_be_of_as_many(self, other: "Sums", why: str) -> None:
        """Refuse a later sweep over another number of samples: a source that is used up."""
        if other.samples != self.samples:
            raise DataError(
                f"{why} goes over the data more than once, and they held {self.samples} samples at first, then "
                f"{other.samples}; give what can be gone over again, such as a DataLoader or a list of batches"
            )

    def must_be_of_the_same(self, other: "Sums", why: str) -> None:
        """Refuse a later sweep over other data, in whatever order or cut, by loss and features up to rounding."""
        self.must_be_of_as_many(other, why)
        rounding = max(self.rounding, other.rounding)
        share = min(max(1000 * rounding, 1e-9), 0.01)
        pairs = {"the number of targets that count": (self.weight, other.weight), "the loss": (self.loss, other.loss)}
        for name in [name for name in self.layers if name in other.layers]:
            energies = self.layers[name].energy, other.layers[name].energy
            pairs[f"the sum of squares of the features of layer {name!r}"] = energies
        for what, (one, two) in pairs.items():
            unknown = math.isnan(one) and math.isnan(two)
            tiny = rounding * self.samples if what == "the loss" else 0.0
            if not unknown and not math.isclose(one, two, rel_tol=share, abs_tol=tiny):
                raise DataError(
                    f"the data changed between two sweeps: {what} was {one:.6g}, then {two:.6g}; {why} needs the "
                    "same samples every time: turn augmentation off (and drop_last, and randomness of the model in "
                    "evaluation mode), or use method='probe', which sees each batch once"
                )

    def results(self, curvature: Curvature) -> dict[str, Flatness]:
        """Divide by what the loss divides by; refuse data with nothing to measure on, and a kappa not finite."""
        if self.batches == 0:
            raise no_data(self.samples)
        found = {}
        for name, x in self.layers.items():
            kappa, trace = self._over_all(x.kappa), self._over_all(x.trace)
            if not math.isfinite(kappa.value):
                raise NonFiniteError(
                    f"kappa of layer {name!r} is {kappa.value}: check the model's weights and the inputs"
                )
            found[name] = Flatness(
                value=kappa.value,
                stderr=kappa.error,
                method=x.method,
                layer=name,
                curvature=curvature,
                trace=trace.value,
                trace_stderr=0.0 if x.exact else trace.error,
                layerwise=x.weight_norm**2 * trace.value,
                weight_norm=x.weight_norm,
                feature_norm2=x.energy / self.samples,
                loss=self._over_all(Sum(self.loss)).value,
                confidence=self.confidence / self.confident if self.confident else None,
                samples=self.samples,
            )
        return found
