"""The spectrum of a layer's Hessian without writing it out, by Lanczos."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from relflat.capture.resolve import Layer
from relflat.capture.uses import Matrix
from relflat.curvature.operators import HessianOperator
from relflat.errors import LayerError
from relflat.measure.batches import Batch, ForwardFn
from relflat.measure.sweep import Measurement, measuring
from relflat.options import Options, checked
from relflat.rng import Rng


@dataclass(frozen=True)
class Estimate:
    """A number with its error.

    Attributes:
        value: the number.
        stderr: its standard error, or a bound on the error where the function says so.
        method: how it was obtained.
    """

    value: float
    stderr: float
    method: str


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a layer's Hessian, as Lanczos sees them from random starts.

    Attributes:
        values: Ritz values of each start, in rising order; nan after the last where a start needed fewer.
        weights: the share of the spectrum that each stands for; those of a start add up to 1.
        size: how many eigenvalues there are.
        top: the largest eigenvalue, with the norm of its residual, and no less than its rounding, as error bound.
    """

    values: Float[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    size: int
    top: Estimate

    @property
    def trace(self) -> Estimate:
        """``Tr H``, by Gauss quadrature exact for each start, with its standard error over the starts."""
        each = self.size * (self.weights * self.values).nansum(1)
        n = len(each)
        stderr = float(each.std()) / math.sqrt(n) if n > 1 else math.nan
        return Estimate(float(each.mean()), stderr, f"lanczos({n} starts)")

    def density(self, at: Float[Tensor, " p"], width: float) -> Float[Tensor, " p"]:
        """The density of eigenvalues smoothed by a Gaussian of this standard deviation; its integral is 1."""
        bells = torch.exp(-((at[:, None, None] - self.values) ** 2) / (2 * width**2)) / (
            width * math.sqrt(2 * math.pi)
        )
        return (bells * self.weights).nansum((1, 2)) / len(self.values)


@checked
def layer_spectrum(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    draws: int = 4,
    max_products: int = 30,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Spectrum:
    """The spectral density and the largest eigenvalue of a layer's Hessian, of the loss over all of the data.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017; Ghorbani et al. 2019): ``max_products`` steps of Lanczos
    with full reorthogonalisation from each of ``draws`` random vectors. ``model``, ``loss_fn``, ``data``, ``layer``,
    ``forward`` and ``device`` are those of :func:`relflat.relative_flatness`; ``seed`` is of the vectors.

    Returns:
        Ritz values and weights; with as many products as dimensions they are the eigenvalues themselves. Cost:
        ``draws * max_products`` forward passes over the data and twice as many backward ones.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> found = layer_spectrum(model, nn.CrossEntropyLoss(), (x, y), layer="output")
        >>> found.size, found.top.value > 0
        (12, True)
    """
    rows, options = [], Options("hessian", measuring=True)
    with measuring(model, loss_fn, data, layer, options, forward, device, seed) as measurement:
        matrix = matrix_of(measurement, layer)
        W = matrix.weight().detach()
        top, residual = -math.inf, math.nan
        for k in range(draws):
            start = Rng(seed, k).normal(W).double().flatten()
            *_, (tridiagonal, beta) = lanczos(functools.partial(_whole, measurement, matrix), start, max_products)
            values, vectors = torch.linalg.eigh(tridiagonal)
            rows.append((values, vectors[0].square()))
            if float(values[-1]) > top:
                top, residual = float(values[-1]), float(beta * vectors[-1, -1].abs())
        residual = max(residual, torch.finfo(W.dtype).eps * abs(top))  # products are no more exact than that
    ritz, shares = (pad_sequence(list(x), True, math.nan).cpu() for x in zip(*rows, strict=True))
    return Spectrum(ritz, shares, W.numel(), Estimate(top, residual, f"lanczos({draws} starts, {ritz.shape[1]})"))


# -- how ---------------------------------------------------------------------------------------------------


def one_of(names: Iterable[str], layer: Layer) -> str:
    """The only name; refuses several."""
    found = list(names)
    if len(found) != 1:
        raise LayerError(f"layer={layer!r} matches {found}; name one")
    return found[0]


def matrix_of(measurement: Measurement, layer: Layer) -> Matrix:
    """The weight of the one layer, as a matrix; the data must be such that they can be gone over again."""
    measurement.batches.must_be_repeatable("Lanczos")
    scene, _ = next(measurement.scenes())
    (subject,) = measurement.estimator.subjects(scene.only([one_of(scene.layers, layer)]))
    matrix = subject.matrix  # a stack as one, its rows below each other
    return replace(matrix, view=lambda w: matrix.view(w).flatten(0, -2))


def product(measurement: Measurement, matrix: Matrix, v: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
    """``H v`` of the loss over all of the data, in float64."""
    total, divisor = torch.zeros_like(matrix.weight()), 0.0
    direction = matrix.back(v.to(total.dtype))
    for scene, (factor, part) in measurement.scenes():
        operator = HessianOperator(scene.loss.sum(), [matrix.as_call()], create_graph=False)
        total += factor * matrix.view(operator([direction])[0])
        divisor += part
    return total.double() / (divisor or 1.0)


def _whole(measurement: Measurement, matrix: Matrix, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return product(measurement, matrix, v.view(matrix.weight().shape)).flatten()


def lanczos(
    of: Callable[[Tensor], Tensor], start: Float[Tensor, " n"], most: int
) -> Iterator[tuple[Float[Tensor, "k k"], Tensor]]:
    """The tridiagonal matrix of a symmetric operator after each product, and the norm of what is left over.

    With full reorthogonalisation; ends after ``most`` products, or where nothing is left over.
    """
    size = min(most, start.numel())
    basis = [start / start.norm()]
    tridiagonal = start.new_zeros(size + 1, size + 1)
    for k in range(size):
        w = of(basis[k])
        tridiagonal[k, k] = w @ basis[k]
        for q in basis * 2:  # twice, so that the basis stays orthogonal
            w = w - (w @ q) * q
        tridiagonal[k + 1, k] = tridiagonal[k, k + 1] = beta = w.norm()
        found = tridiagonal[: k + 1, : k + 1]
        yield found, beta
        if float(beta) <= 1e-14 * float(found.abs().max()):
            return
        basis.append(w / beta)


def largest(
    of: Callable[[Tensor], Tensor], start: Float[Tensor, " n"], rtol: float, most: int
) -> tuple[float, float]:
    """Largest eigenvalue of a symmetric operator and the norm of its residual, by Lanczos."""
    top = residual = 0.0
    for tridiagonal, beta in lanczos(of, start, most):
        values, vectors = torch.linalg.eigh(tridiagonal)
        top, residual = float(values[-1]), float(beta * vectors[-1, -1].abs())
        if residual <= rtol * abs(top):
            break
    return top, residual
