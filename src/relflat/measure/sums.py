"""Running sums of a measurement over batches and probes, and the results made of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from relflat.errors import DataError, NonFiniteError
from relflat.options import Curvature
from relflat.result import Flatness


def mean_and_variance(values: Tensor | None, exact: bool) -> tuple[float, float]:
    """Sum over groups of the mean over probes, and the variance of that sum (probes independent)."""
    if values is None:
        return math.nan, math.nan
    v = values.detach().double()
    k = v.shape[0]
    variance = 0.0 if exact else float(v.var(0).sum()) / k if k > 1 else math.nan
    return float(v.mean(0).sum()), variance


def joined(one: str, two: str) -> str:
    """The methods of two parts of the data, each named once."""
    return ", ".join(dict.fromkeys(m for m in (*one.split(", "), *two.split(", ")) if m))


_ADDED_BY_LAYER = ("kappa", "kappa_var", "trace", "trace_var", "energy")
_ADDED = ("loss", "confidence", "confident", "samples", "weight", "batches")


@dataclass
class LayerSums:
    """Running sums for one layer, in float64, each already weighted as the whole loss is."""

    kappa: float = 0.0
    kappa_var: float = 0.0
    trace: float = 0.0
    trace_var: float = 0.0
    energy: float = 0.0
    weight_norm: float = 0.0
    method: str = ""
    exact: bool = True

    def settle(self, kappa: float, variance: float, method: str) -> None:
        """Kappa of all the data at once, without ``Tr H``."""
        self.kappa, self.kappa_var, self.method, self.exact = kappa, variance, method, method == "exact"
        self.trace = self.trace_var = math.nan

    def __add__(self, other: "LayerSums") -> "LayerSums":
        """The sums over both parts of the data."""
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDED_BY_LAYER}
        norm, exact = self.weight_norm or other.weight_norm, self.exact and other.exact
        return LayerSums(**added, weight_norm=norm, method=joined(self.method, other.method), exact=exact)


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

    def add_loss(self, loss: Tensor, factor: float, divisor: float) -> None:
        """Count a batch, with what its loss is multiplied by and what it adds to the divisor of the sum."""
        self.loss += factor * float(loss.detach().sum())
        self.weight, self.batches = self.weight + divisor, self.batches + 1
        self.round_to(loss.dtype)

    def round_to(self, dtype: torch.dtype) -> None:
        """Take note that numbers of this precision went in."""
        self.rounding = max(self.rounding, torch.finfo(dtype).eps)

    def short_of(self, rtol: float, *, widened: Mapping[str, float] | None = None) -> dict[str, str]:
        """The layers whose error is too large, each with its value and error in words.

        Args:
            rtol: the largest share of the value that the error may be.
            widened: by layer, what to multiply its error with first.
        """
        short = {}
        for name, x in self.layers.items():
            value, error = self._scaled(x.kappa), self._error(x.kappa_var)
            if not x.exact and not error * (widened or {}).get(name, 1.0) <= rtol * abs(value):
                short[name] = f"kappa({name}) = {value:.4g} ± {error:.2g}"
        return short

    def needed(self, rtol: float) -> float:
        """How many probes ``rtol`` asks for at least, as the error falls with their root.

        A value may be larger than it was found by two errors, and is taken to be.
        """
        shares = [
            self._error(x.kappa_var) / (abs(self._scaled(x.kappa)) + 2 * self._error(x.kappa_var))
            for x in self.layers.values()
            if not x.exact and x.kappa_var > 0
        ]
        return self.probes * (max(shares, default=0.0) / rtol) ** 2

    def _scaled(self, total: float) -> float:
        return total / self.weight if self.weight else total

    def _error(self, variance: float) -> float:
        return self._scaled(math.sqrt(max(variance, 0.0)))

    def __add__(self, other: "Sums") -> "Sums":
        """The sums over both parts of the data, of the same layers and probes."""
        layers = {name: x + other.layers.get(name, LayerSums()) for name, x in self.layers.items()}
        layers |= {name: x for name, x in other.layers.items() if name not in layers}
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return Sums(layers, self.probes, **added, rounding=max(self.rounding, other.rounding))

    def check(self) -> None:
        """Refuse data that hold nothing to measure on."""
        if self.batches == 0:
            raise DataError(
                "the data holds no target that counts: every one is ignored (ignore_index)"
                if self.samples
                else "the data is empty: no batch to measure on"
            )

    def must_be_of_as_many(self, other: "Sums", why: str) -> None:
        """Refuse a later sweep over another number of samples: a source that is used up.

        Raises:
            DataError: saying how many there were.
        """
        if other.samples != self.samples:
            raise DataError(
                f"{why} goes over the data more than once, and they held {self.samples} samples at first, then "
                f"{other.samples}; give what can be gone over again, such as a DataLoader or a list of batches"
            )

    def must_be_of_the_same(self, other: "Sums", why: str) -> None:
        """Refuse a later sweep in which the loss, or the features of a layer, differ by more than rounding.

        The order and the cut into batches may differ.

        Raises:
            DataError: naming what differs.
        """
        self.must_be_of_as_many(other, why)
        share = min(max(1000 * max(self.rounding, other.rounding), 1e-9), 0.01)
        pairs = [
            ("the number of targets that count", self.weight, other.weight, 0.0),
            ("the loss", self.loss, other.loss, max(self.rounding, other.rounding) * self.samples),
        ]
        for name in [name for name in self.layers if name in other.layers]:
            one, two = self.layers[name].energy, other.layers[name].energy
            pairs.append((f"the sum of squares of the features of layer {name!r}", one, two, 0.0))
        for what, one, two, tiny in pairs:
            unknown = math.isnan(one) and math.isnan(two)
            if not unknown and not math.isclose(one, two, rel_tol=share, abs_tol=tiny):
                raise DataError(
                    f"the data changed between two sweeps: {what} was {one:.6g}, then {two:.6g}; {why} needs the "
                    "same samples every time: turn augmentation off (and drop_last, and randomness of the model in "
                    "evaluation mode), or use method='probe', which sees each batch once"
                )

    def merge(self, other: "Sums") -> None:
        """Average with a sweep that used other probes, by number of probes.

        Raises:
            DataError: the sweep was over another number of samples.
        """
        self.must_be_of_as_many(other, "rtol")
        a = self.probes / (self.probes + other.probes)
        for name, x in self.layers.items():
            y = other.layers[name]
            x.kappa, x.trace = a * x.kappa + (1 - a) * y.kappa, a * x.trace + (1 - a) * y.trace
            x.kappa_var = a**2 * x.kappa_var + (1 - a) ** 2 * y.kappa_var
            x.trace_var = a**2 * x.trace_var + (1 - a) ** 2 * y.trace_var
            x.method = x.method.replace(f"{self.probes})", f"{self.probes + other.probes})")
        self.probes += other.probes

    def results(self, curvature: Curvature) -> dict[str, Flatness]:
        """Divide by what the loss divides by, and check."""
        found = {}
        for name, x in self.layers.items():
            trace = self._scaled(x.trace)
            found[name] = Flatness(
                value=self._scaled(x.kappa),
                stderr=0.0 if x.exact else self._error(x.kappa_var),
                method=x.method,
                layer=name,
                curvature=curvature,
                trace=trace,
                trace_stderr=0.0 if x.exact else self._error(x.trace_var),
                layerwise=x.weight_norm**2 * trace,
                weight_norm=x.weight_norm,
                feature_norm2=x.energy / self.samples,
                loss=self._scaled(self.loss),
                confidence=self.confidence / self.confident if self.confident else None,
                samples=self.samples,
            )
            if not math.isfinite(found[name].value):
                raise NonFiniteError(
                    f"kappa of layer {name!r} is {found[name].value}: check the model's weights and the inputs"
                )
        return found
