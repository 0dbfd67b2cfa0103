"""What is known about a loss as a function of the logits: the factors of its Hessian, weights, reduction.

A loss is known only if its Hessian with respect to the logits is provably block-diagonal over rows (one row
of logits a position) with blocks of one of two forms. Anything else is not described here and goes through
automatic differentiation, with no loss of exactness.

To add a loss, write a function that turns a module or a call into a :class:`KnownLoss` and list it in
``_KNOWN``.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LogitHessian(Protocol):
    """Rows ``A_p = d2 L / dz_p2``, the weights and the reduction of the loss included."""

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """The diagonal of ``W' A_p W``."""

    def total(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, " p"]:
        """``Tr(W' A_p W)``."""

    def trace(self) -> Float[Tensor, " p"]:
        """``Tr A_p``."""

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``S_p eps_p`` with ``S_p S_p' = A_p``."""

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``A_p v_p``."""

    def times(self, constant: float) -> "LogitHessian":
        """``constant * A_p``, for a constant that is not negative."""


class SoftmaxHessian:
    """``A_p = mass_p (diag p - p p')``: cross-entropy (identity I1 of the design).

    Everything is written in ``q = p - e_k``, k the most likely class, whose entries are of the size of what
    is missing to certainty. So the variance keeps its relative accuracy when ``p`` is nearly one-hot, where
    ``E|w|^2 - |E w|^2`` would lose all of it.
    """

    def __init__(self, logits: Float[Tensor, "p d"], mass: Float[Tensor, " p"]) -> None:
        self.mass = mass
        self.log_p = F.log_softmax(logits, dim=-1)
        self.k = self.log_p.argmax(-1, keepdim=True)
        self.others = self.log_p.exp().scatter(-1, self.k, 0.0)
        self.missing = self.others.sum(-1)

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """``E_p w^2 - (E_p w)^2`` feature by feature, times the mass."""
        q, centred, mean = self._deviations(weight)
        return self.mass[:, None] * (q @ centred.square() - mean * (2 * centred[self.k[:, 0]] + mean))

    def total(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, " p"]:
        """``E_p ||w||^2 - ||E_p w||^2``, times the mass."""
        q, centred, mean = self._deviations(weight)
        spread = (mean * (2 * centred[self.k[:, 0]] + mean)).sum(-1)
        return self.mass * (q @ centred.square().sum(-1) - spread)

    def _deviations(self, weight: Float[Tensor, "d m"]) -> tuple[Tensor, Tensor, Tensor]:
        """``q``, the weight without its mean row (which kappa does not see, but rounding does), ``q W``."""
        q = self.others.scatter(-1, self.k, -self.missing[:, None])
        centred = weight - weight.detach().mean(0)
        return q, centred, q @ centred

    def trace(self) -> Float[Tensor, " p"]:
        """``1 - ||p||^2`` times the mass."""
        return self.mass * (2 * self.missing - self.missing.square() - self.others.square().sum(-1))

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``sqrt(p) eps - p <sqrt(p), eps>`` times the root of the mass (I7)."""
        root = (0.5 * self.log_p).exp()
        along = (root * eps).sum(-1, keepdim=True)
        return self.mass.sqrt()[:, None] * (root * eps - self.log_p.exp() * along)

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``p v - p <p, v>`` times the mass."""
        p = self.log_p.exp()
        return self.mass[:, None] * p * (v - (p * v).sum(-1, keepdim=True))

    def times(self, constant: float) -> "SoftmaxHessian":
        """The mass times the constant."""
        scaled = copy.copy(self)
        scaled.mass = self.mass * constant
        return scaled


class DiagonalHessian:
    """``A_p = diag(a_p)``: losses that are sums over the outputs, each of one output (identity I2)."""

    def __init__(self, a: Float[Tensor, "p d"]) -> None:
        self.a = a

    def diagonal(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, "p m"]:
        """``sum_c a_c w_c^2`` feature by feature."""
        return self.a @ weight.square()

    def total(self, weight: Float[Tensor, "d m"]) -> Float[Tensor, " p"]:
        """``sum_c a_c ||w_c||^2``."""
        return self.a @ weight.square().sum(-1)

    def trace(self) -> Float[Tensor, " p"]:
        """``sum_c a_c``."""
        return self.a.sum(-1)

    def factor(self, eps: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``sqrt(a) eps``; without the infinite slope of the root where ``a`` is 0."""
        live = self.a > 0
        return torch.where(live, torch.where(live, self.a, 1.0).sqrt(), 0.0) * eps

    def product(self, v: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        """``a v``."""
        return self.a * v

    def times(self, constant: float) -> "DiagonalHessian":
        """The entries times the constant."""
        return DiagonalHessian(self.a * constant)


Hessian = Callable[[Tensor, Tensor], LogitHessian]


@dataclass(frozen=True)
class KnownLoss:
    """A loss whose Hessian with respect to the logits is known in closed form.

    Attributes:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        class_dim: the dimension of the logits that holds one row: 1 for cross-entropy, -1 for elementwise.
        hessian: ``(outputs, targets) -> LogitHessian`` of the loss as reduced ("none" counts as "sum").
        normaliser: ``(outputs, targets) -> scalar`` a mean reduction divides by: samples, class weights or
            tokens not ignored.
        confidence: ``(outputs, targets) ->`` the probability of the most likely class at each row that counts.
        elementwise: whether a row may be cut anywhere, as each output stands alone.
    """

    reduction: str
    class_dim: int
    hessian: Hessian
    normaliser: Callable[[Tensor, Tensor], Tensor]
    confidence: Callable[[Tensor, Tensor], Tensor] | None
    elementwise: bool

    def times(self, constant: float) -> "KnownLoss":
        """The loss multiplied by a constant that is not negative."""
        return replace(self, hessian=lambda outputs, targets: self.hessian(outputs, targets).times(constant))

    def classes_last(self, outputs: Float[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """The logits with one row in the last dimension."""
        return outputs.movedim(self.class_dim, -1) if outputs.ndim > 1 else outputs

    def classes_back(self, outputs: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """Undo :meth:`classes_last`."""
        return outputs.movedim(-1, self.class_dim) if outputs.ndim > 1 else outputs


def known_loss(
    loss_fn: Callable[..., Any], outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any]
) -> KnownLoss | None:
    """Describe the loss ``loss_fn(outputs, *targets, **kwargs)``, or return None if it is not known exactly.

    Recognised: ``CrossEntropyLoss``, ``BCEWithLogitsLoss``, ``MSELoss``, their functional forms, and
    ``functools.partial`` of those.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or len(targets) != 1:
        return None
    if not isinstance(targets[0], Tensor) or targets[0].requires_grad:
        return None
    if isinstance(loss_fn, functools.partial):
        if loss_fn.args:
            return None
        return known_loss(loss_fn.func, outputs, targets, {**loss_fn.keywords, **kwargs})
    for module, function, describe in _KNOWN:
        if isinstance(loss_fn, nn.Module) and type(loss_fn).forward is module.forward and not kwargs:
            accepted = _parameters(function)
            options = {k: v for k, v in vars(loss_fn).items() if k in accepted}
            options |= {k: v for k, v in loss_fn.named_buffers() if k in accepted}
            return describe(outputs, targets[0], **options)
        if loss_fn is function and not {"size_average", "reduce"} & set(kwargs):
            return describe(outputs, targets[0], **kwargs)
    return None


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _softmax_cross_entropy(
    outputs: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> KnownLoss | None:
    """Cross-entropy: hard labels have mass ``(1-s) w_y + s/C sum_c w_c``, soft ones ``sum_c w_c t_c``."""
    probabilities = target.is_floating_point()
    if probabilities and target.shape != outputs.shape:
        return None
    class_dim = 1 if outputs.ndim > 1 else 0

    def masses(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mass of each row, and the sum a mean reduction divides by."""
        d = outputs.shape[class_dim]
        w = (outputs.new_ones(d) if weight is None else weight).to(_wide(outputs))
        if probabilities:
            t = target.movedim(class_dim, -1).reshape(-1, d).to(w.dtype)
            mass = (t * (1 - label_smoothing) + label_smoothing / d) @ w
            return mass, mass.new_tensor(float(mass.numel()))
        y = target.reshape(-1)
        valid = y != ignore_index
        own = torch.where(valid, w[torch.where(valid, y, 0)], 0.0)
        mass = (1 - label_smoothing) * own + torch.where(valid, label_smoothing / d * w.sum(), 0.0)
        return mass, own.sum()

    def hessian(outputs: Tensor, target: Tensor) -> LogitHessian:
        mass, total = masses(outputs, target)
        logits = outputs.movedim(class_dim, -1).reshape(-1, outputs.shape[class_dim])
        return SoftmaxHessian(logits.to(_wide(outputs)), mass / total if reduction == "mean" else mass)

    def confidence(outputs: Tensor, target: Tensor) -> Tensor:
        top = outputs.detach().to(_wide(outputs)).softmax(class_dim).amax(class_dim)
        return top if target.is_floating_point() else top[target != ignore_index]

    return KnownLoss(
        reduction,
        class_dim,
        hessian,
        lambda o, t: masses(o, t)[1],
        confidence,
        elementwise=False,
    )


def _elementwise(
    second: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, target: Tensor, reduction: str
) -> KnownLoss | None:
    """A loss that is a mean or sum over elements, ``second`` its second derivative at each of them."""
    if outputs.shape != target.shape:
        return None  # broadcasting couples what the reduction divides by; leave it to autograd

    def hessian(outputs: Tensor, target: Tensor) -> LogitHessian:
        a = second(outputs.to(_wide(outputs)), target.to(_wide(outputs))).expand(outputs.shape)
        a = a / a.numel() if reduction == "mean" else a
        return DiagonalHessian(a.reshape(-1, a.shape[-1] if a.ndim else 1))

    return KnownLoss(
        reduction, -1, hessian, lambda o, t: o.new_tensor(float(o.numel())), None, elementwise=True
    )


def _bce_with_logits(
    outputs: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> KnownLoss | None:
    def second(z: Tensor, y: Tensor) -> Tensor:
        scale = torch.ones_like(z) if weight is None else weight
        scale = scale if pos_weight is None else scale * (1 + (pos_weight - 1) * y)
        return scale * z.sigmoid() * (-z).sigmoid()

    def confidence(z: Tensor, y: Tensor) -> Tensor:
        return z.detach().to(_wide(z)).abs().sigmoid()

    loss = _elementwise(second, outputs, target, reduction)
    return loss and replace(loss, confidence=confidence)


def _mse(
    outputs: Tensor, target: Tensor, *, reduction: str = "mean", weight: Tensor | None = None
) -> KnownLoss | None:
    if weight is not None:
        return None  # the weighted mean of F.mse_loss is left to autograd
    return _elementwise(lambda z, y: torch.full_like(z, 2.0), outputs, target, reduction)


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where the input is: half precision is too coarse for curvature."""
    return torch.promote_types(x.dtype, torch.float32)


Describe = Callable[..., KnownLoss | None]
_KNOWN: list[tuple[type[nn.Module], Callable[..., Tensor], Describe]] = [
    (nn.CrossEntropyLoss, F.cross_entropy, _softmax_cross_entropy),
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, _bce_with_logits),
    (nn.MSELoss, F.mse_loss, _mse),
]
