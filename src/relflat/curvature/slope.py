"""The slope of a loss in its outputs where autograd's derivative of it is missing, or not what it says.

Fused losses make their gradient in the forward pass, and a compiled or hand-written backward may take for a constant
what is none: no error, and a curvature of 0 or of a part. Of these the loss itself is asked, at moved outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relflat.capture.graph import ancestors, foreign
from relflat.curvature.operators import MISSING, differentiate
from relflat.errors import LossError, SecondDerivativeError
from relflat.rng import Rng, RngState, rng_now, rng_preserved

_STENCIL = ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0))  # of 12 h f'
_ASIDE = 0.05  # relative to the largest entry: what counts as another curvature


@dataclass(frozen=True, eq=False)
class AskedLoss:
    """A loss as a function of its outputs, in the widest type that it takes."""

    loss_of: Callable[[Tensor], Any]
    outputs: Tensor
    rng: RngState

    @classmethod
    def of(cls, loss_of: Callable[[Tensor], Any], outputs: Tensor) -> "AskedLoss":
        """The loss around these outputs."""
        z, rng = outputs.detach(), rng_now()
        for dtype in (torch.float64, torch.float32):
            wide = cls(loss_of, z.to(dtype), rng)
            try:
                wide.slope(wide.outputs)
            except (RuntimeError, TypeError, ValueError, AssertionError):
                continue  # a kernel for some types only
            return wide
        return cls(loss_of, z, rng)

    def slope(self, z: Tensor) -> Tensor:
        """The gradient at some outputs, with the random numbers of every other time."""
        with torch.enable_grad(), rng_preserved(self.rng):
            z = z.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.loss_of(z).sum(), z)
        return found

    def curve(self, v: Tensor, fraction: float = 1.0) -> Tensor:
        """``A v``, by five-point differences of the slope: error O(h^4)."""
        v = v.detach().to(self.outputs.dtype)
        size = v.abs().max().clamp_min(torch.finfo(v.dtype).tiny)
        h = self.outputs.square().mean().sqrt().clamp(1e-2, 1.0)
        h = h * fraction * (1e-3 if v.dtype == torch.float64 else 2e-2)
        total = torch.zeros_like(v)
        for k, factor in _STENCIL:
            total += factor * self.slope(self.outputs + k * h / size * v)
        return total * size / (12 * h)

    def as_tensor(self, outputs: Tensor) -> Tensor:
        """The slope at the outputs, to be differentiated once."""
        found: Tensor = _Slope.apply(outputs, self)  # type: ignore[no-untyped-call]  # PyTorch has no type
        return found


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, asked: AskedLoss) -> Tensor:
        ctx.asked, ctx.dtype = asked, outputs.dtype
        return asked.slope(asked.outputs).to(outputs.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return ctx.asked.curve(v).to(ctx.dtype), None


def must_be_asked(
    loss: Tensor, outputs: Tensor, loss_of: Callable[[Tensor], Tensor | None] | None, rng: Rng, *, only_products: bool
) -> bool:
    """Whether autograd has no second derivative of the loss in the outputs, or one that is wrong.

    Looked into where somebody's own derivative lies between the two, where one is missing, or where the slope does
    not change; all else is believed.

    Raises:
        LossError: that cannot be told as the loss cannot be computed at other outputs.
        SecondDerivativeError: there is none, and differences would not do, as more than products is wanted.
    """
    (slope,) = differentiate([loss], [outputs], None, create_graph=True)
    if slope is None:
        return False
    own, missing = _unsound(loss, slope, outputs)
    if slope.requires_grad and own is None and not missing:
        return False
    if loss_of is None or loss_of(outputs.detach()) is None:
        if own is None or missing:
            return False  # a hinge; or autograd says what is missing
        differentiate([slope], [outputs], [torch.ones_like(slope)], create_graph=False)  # it may say so itself
        raise LossError(
            f"the loss goes through {own}, whose second derivative may be wrong without a word, and only where the "
            "loss is computed from the model's outputs by criterion(outputs, targets) can that be told; call it "
            "so, or use a plain loss"
        )
    try:
        return not _agrees(slope, outputs, AskedLoss.of(loss_of, outputs), rng)
    except SecondDerivativeError:
        if only_products:
            return True
        raise


def _unsound(loss: Tensor, slope: Tensor, outputs: Tensor) -> tuple[str | None, bool]:
    """An operation from outputs to loss whose derivative is somebody's own code; whether one of the slope lacks."""
    start = [outputs.grad_fn] if outputs.grad_fn else []
    own = next((str(n.name()) for n in ancestors(loss.grad_fn, without=start) if foreign(n)), None)
    return own, any(n.name() in MISSING for n in ancestors(slope.grad_fn, without=start))


def _agrees(slope: Tensor, outputs: Tensor, asked: AskedLoss, rng: Rng) -> bool:
    """Whether ``A v`` by autograd is that by differences, for a random v, or those do not converge (at a kink)."""
    v = rng.signs(tuple(outputs.shape), outputs)
    (mine,) = differentiate([slope], [outputs], [v], create_graph=False)
    whole, half = asked.curve(v), asked.curve(v, 0.5)
    size = whole.abs().max() + 1e-4 * slope.detach().abs().max().to(whole.dtype)
    if bool((whole - half).abs().max() > _ASIDE * size):
        return True
    gap = whole if mine is None else whole - mine.to(whole.dtype)
    return bool(gap.abs().max() <= _ASIDE * size)
