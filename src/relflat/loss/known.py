"""What is known about a loss as a function of the logits: the factors of its Hessian, weights, reduction.

A loss is known only if its Hessian with respect to the logits is provably block-diagonal over rows (one row
of logits a position) with blocks of one of two forms. Anything else is not described here and goes through
automatic differentiation, with no loss of exactness.

To add a loss, write a function that turns a call into a :class:`KnownLoss` and :func:`register` it.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from relflat.loss.hessians import DiagonalHessian, LogitHessian, SoftmaxHessian


@dataclass(frozen=True, eq=False)
class KnownLoss:
    """A loss of given logits and targets, whose Hessian with respect to the logits is known in closed form."""

    outputs: Float[Tensor, "..."]  # the logits, or what it is the same function of; with their graph
    reduction: str  # "mean", "sum" or "none"
    class_dim: int  # the dimension of the logits that holds one row: 1 for cross-entropy, -1 for elementwise
    hessian_at: Callable[[Tensor], LogitHessian]  # of the loss as reduced; "none" counts as "sum"
    divisor: Callable[[], Tensor] | None  # of a mean: samples, class weights, tokens not ignored; None: not known
    confidence: Callable[[], Tensor] | None  # of the most likely class, at each row that counts
    elementwise: bool  # whether a row may be cut anywhere, as each output stands alone
    _made: dict[bool, LogitHessian] = field(default_factory=dict, init=False, repr=False)

    def hessian(self, *, constant: bool) -> LogitHessian:
        """The Hessian, without a graph if it counts as constant."""
        if constant not in self._made:
            self._made[constant] = self.hessian_at(self.outputs.detach() if constant else self.outputs)
        return self._made[constant]

    def times(self, constant: float) -> "KnownLoss":
        """The loss multiplied by a constant of this batch, not negative: how batches add up is not known then."""
        return replace(self, hessian_at=lambda outputs: self.hessian_at(outputs).times(constant), divisor=None)

    def curve(self, v: Float[Tensor, "..."], *, constant: bool) -> Float[Tensor, "..."]:
        """``A v``, v shaped as the outputs."""
        hessian, like = self.hessian(constant=constant), replace(self, outputs=v)
        rows = like.rows()
        return self.from_rows(hessian.product(rows.reshape(-1, rows.shape[-1] if rows.ndim else 1).to(_wide(v))))

    def rows(self) -> Float[Tensor, "... d"]:
        """The logits with one row in the last dimension."""
        last = self.class_dim in (-1, self.outputs.ndim - 1) or self.outputs.ndim < 2
        return self.outputs if last else self.outputs.movedim(self.class_dim, -1)

    def from_rows(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """Undo :meth:`rows`, for a tensor like it."""
        rows = rows.reshape(self.rows().shape).to(self.outputs.dtype)
        return rows.movedim(-1, self.class_dim) if rows.ndim > 1 else rows


Describe = Callable[..., KnownLoss | None]
Weight = Tensor | None
_KNOWN: list[tuple[type[nn.Module], Callable[..., Tensor], Describe]] = []


def register(module: type[nn.Module], function: Callable[..., Tensor], describe: Describe) -> None:
    """Add a loss whose Hessian in the logits is known, by its class and as ``function(outputs, targets, **options)``.

    Options are the module's attributes of these names; a subclass with a ``forward`` of its own is another loss.
    ``describe(outputs, targets, **options)`` gives a :class:`KnownLoss`, or None where it is not sure.
    """
    _KNOWN.append((module, function, describe))


def known_loss(
    loss_fn: Callable[..., Any], outputs: Any, targets: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> KnownLoss | None:
    """What is known of ``loss_fn(outputs, *targets, **kwargs)``, a registered loss or a ``partial``; or None."""
    loss_fn = uncompiled(loss_fn)
    if not _fit(outputs, targets):
        return None
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        return known_loss(loss_fn.func, outputs, targets, {**loss_fn.keywords, **kwargs})
    for module, function, describe in _KNOWN:
        if isinstance(loss_fn, nn.Module) and _runs(loss_fn, module.forward) and not kwargs:
            attributes = vars(loss_fn) | loss_fn._buffers
            return describe(
                outputs, targets[0], **{k: attributes[k] for k in _parameters(function) & attributes.keys()}
            )
        if loss_fn is function and not {"size_average", "reduce"} & set(kwargs):
            return describe(outputs, targets[0], **kwargs)
    return None


def uncompiled(function: Any) -> Any:
    """What ``torch.compile`` was given, if this is what it made of it."""
    known = function._modules if isinstance(function, nn.Module) else getattr(function, "__dict__", {})
    inner = known.get("_orig_mod", known.get("_torchdynamo_orig_callable"))
    return function if inner is None else uncompiled(inner)


def _runs(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling the module is this ``forward`` and nothing else: neither hooked nor patched."""
    state = vars(module)
    hooked = state["_forward_hooks"] or state["_forward_pre_hooks"]
    return type(module).forward is forward and "forward" not in state and not hooked


def _fit(outputs: Any, targets: tuple[Any, ...]) -> bool:
    """Whether there are real outputs and one constant tensor of targets."""
    if len(targets) != 1 or not isinstance(outputs, Tensor) or not isinstance(targets[0], Tensor):
        return False
    return outputs.is_floating_point() and not targets[0].requires_grad


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _softmax_cross_entropy(
    outputs: Tensor,
    target: Tensor,
    *,
    weight: Weight = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> KnownLoss | None:
    """I1: the blocks are ``mass_p (diag p - p p')``, p the softmax and the mass linear in the targets."""
    probabilities = target.is_floating_point()
    if probabilities and target.shape != outputs.shape:
        return None
    dim = 1 if outputs.ndim > 1 else 0
    d, wide = outputs.shape[dim], _wide(outputs)

    def masses() -> tuple[Tensor, Tensor]:
        """The mass of each row, and the sum a mean reduction divides by."""
        w = None if weight is None else weight.to(wide)
        if probabilities:  # sum_c w_c t_c, targets smoothed
            w = outputs.new_ones(d, dtype=wide) if w is None else w
            t = target.movedim(dim, -1).reshape(-1, d).to(w.dtype)
            mass = (t * (1 - label_smoothing) + label_smoothing / d) @ w
            return mass, mass.new_tensor(float(mass.numel()))
        y = target.reshape(-1).long()
        valid = y != ignore_index
        if w is None:
            return valid, valid.sum(dtype=wide)
        own = torch.where(valid, w[torch.where(valid, y, 0)], 0.0)
        # (1-s) w_y + s/C sum_c w_c
        mass = (1 - label_smoothing) * own + torch.where(valid, label_smoothing / d * w.sum(), 0.0)
        return mass, own.sum()

    def hessian_at(logits: Tensor) -> LogitHessian:
        mass, total = masses()
        rows = (logits if logits.ndim == 2 else logits.movedim(dim, -1).reshape(-1, d)).to(wide)
        return SoftmaxHessian(rows, mass / total if reduction == "mean" else mass.to(wide))

    def confidence() -> Tensor:
        top = outputs.detach().to(wide).softmax(dim).amax(dim)
        return top if probabilities else top[target.long() != ignore_index]

    return KnownLoss(outputs, reduction, dim, hessian_at, lambda: masses()[1], confidence, elementwise=False)


def weighted_cross_entropy(logits: Float[Tensor, "... d"], mass: Float[Tensor, " p"]) -> KnownLoss:
    """A sum of cross-entropies, each row's with its mass; classes in the last dimension."""

    def hessian_at(logits: Tensor) -> LogitHessian:
        wide = _wide(logits)
        return SoftmaxHessian(logits.reshape(-1, logits.shape[-1]).to(wide), mass.to(wide))

    return KnownLoss(logits, "sum", -1, hessian_at, None, None, elementwise=False)


def _elementwise(
    second: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, target: Tensor, reduction: str
) -> KnownLoss | None:
    """I2, for a mean or sum over elements; ``second`` is the second derivative at each of them."""
    if outputs.shape != target.shape:
        return None  # broadcasting couples what the reduction divides by; leave it to autograd

    def hessian_at(logits: Tensor) -> LogitHessian:
        a = second(logits.to(_wide(logits)), target.to(_wide(logits))).expand(logits.shape)
        a = a / a.numel() if reduction == "mean" else a
        return DiagonalHessian(a.reshape(-1, a.shape[-1] if a.ndim else 1))

    size = functools.partial(outputs.new_tensor, float(outputs.numel()))
    return KnownLoss(outputs, reduction, -1, hessian_at, size, None, elementwise=True)


def _bce_with_logits(
    outputs: Tensor, target: Tensor, *, weight: Weight = None, reduction: str = "mean", pos_weight: Weight = None
) -> KnownLoss | None:
    def second(z: Tensor, y: Tensor) -> Tensor:
        scale = torch.ones_like(z) if weight is None else weight
        scale = scale if pos_weight is None else scale * (1 + (pos_weight - 1) * y)
        return scale * z.sigmoid() * (-z).sigmoid()

    loss = _elementwise(second, outputs, target, reduction)
    return loss and replace(loss, confidence=lambda: outputs.detach().to(_wide(outputs)).abs().sigmoid())


def _mse(outputs: Tensor, target: Tensor, *, reduction: str = "mean", weight: Weight = None) -> KnownLoss | None:
    if weight is not None:
        return None  # the weighted mean of F.mse_loss is left to autograd
    return _elementwise(lambda z, y: torch.full_like(z, 2.0), outputs, target, reduction)


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where the input is: half precision is too coarse for curvature."""
    return torch.promote_types(x.dtype, torch.float32)


register(nn.CrossEntropyLoss, F.cross_entropy, _softmax_cross_entropy)
register(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, _bce_with_logits)
register(nn.MSELoss, F.mse_loss, _mse)
