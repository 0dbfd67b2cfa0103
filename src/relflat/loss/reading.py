"""Reads from its graph how a scalar loss was made from logits, for frameworks that compute the loss themselves.

Understood is ``c * loss(z)``: c constants by which the loss was multiplied or divided (accumulation, gradient
scaling, number of tokens), loss one of those of :mod:`relflat.loss.known` with a mean or sum reduction, z the logits.
Targets, class weights and ignored index are the ones autograd saved, so nothing about the batch is guessed. Anything
else is not described, and goes through automatic differentiation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from relflat.capture.calls import Call
from relflat.capture.graph import KEEPING, MOVING, SELECTING, follow, operation
from relflat.loss.known import KnownLoss, known_loss

_REDUCTION = {1: "mean", 2: "sum"}


@dataclass(frozen=True, eq=False)
class Reading:
    """What a loss was computed from.

    Attributes:
        known: the loss of the logits, or of log-probabilities of which it is the same function, constants included.
        call: the call of an output layer that gave the logits, if it is one of those asked about.
    """

    known: KnownLoss
    call: Call | None


def read_loss(loss: Tensor, calls: Sequence[Call]) -> Reading | None:
    """Read the graph of a scalar loss, before it is freed; None if the loss is not understood.

    Args:
        loss: the loss.
        calls: recorded calls, among them perhaps that of the output layer.
    """
    if loss.numel() != 1 or not bool(torch.isfinite(loss.detach()).all()):
        return None
    node, constant = _without_constants(loss.grad_fn)
    reduction = _REDUCTION.get(getattr(node, "_saved_reduction", 0))
    if node is None or reduction is None or not constant > 0:
        return None
    name = operation(node)
    if name in ("NllLoss", "NllLoss2D"):
        reading = _cross_entropy(node, reduction, calls, float(loss.detach()) / constant)
    else:
        reading = _elementwise(node, reduction) if name in _ELEMENTWISE else None
    return reading and Reading(reading.known.times(constant), reading.call)


def _without_constants(node: Node | None) -> tuple[Any, float]:
    """The operation that made the loss, if it is clear, and the product of the constants that multiply it."""
    constant = 1.0
    while node is not None:
        kind = operation(node)
        if kind in ("Mul", "Div"):
            parents = [parent for parent, _ in node.next_functions]
            side = 1 if parents[0] is None else 0
            if (len(parents) > 1 and None not in parents) or (side == 1 and kind == "Div"):
                return None, constant
            factor = getattr(node, "_saved_self" if side else "_saved_other", None)
            if factor is None or (isinstance(factor, Tensor) and factor.numel() != 1):
                return None, constant
            constant = constant * float(factor) if kind == "Mul" else constant / float(factor)
            node = parents[side]
        elif kind in KEEPING:
            node = node.next_functions[0][0]
        else:
            break
    return node, constant


# -- cross-entropy -------------------------------------------------------------------------------------------


def _cross_entropy(node: Any, reduction: str, calls: Sequence[Call], value: float) -> Reading | None:
    above = follow(node.next_functions[0][0], KEEPING)
    if above is None or operation(above) != "LogSoftmax":
        return None
    saved, dim = above._saved_result, _signed(above._saved_dim)
    log_p = saved.movedim(dim, -1)
    log_p = log_p.reshape(-1, log_p.shape[-1])
    targets, ignored = node._saved_target.reshape(-1), _signed(node._saved_ignore_index)
    options = {"weight": node._saved_weight, "ignore_index": ignored, "reduction": reduction}
    if targets.numel() != log_p.shape[0]:
        return None
    seen = F.nll_loss(log_p.detach(), targets, **options)
    if not math.isclose(float(seen), value, rel_tol=1e-2 if seen.dtype.itemsize < 4 else 1e-4, abs_tol=1e-6):
        return None
    for call in calls:
        last = dim in (-1, saved.ndim - 1)
        rows = _rows_taken(call, above, log_p.detach(), classes_last=last)
        if rows is not None:
            z = call.outputs_last()
            y = torch.full(z.shape[:-1], ignored, dtype=targets.dtype, device=targets.device)
            y.view(-1)[rows] = targets
            return _reading(F.cross_entropy, z.movedim(-1, 1) if z.ndim > 1 else z, y, options, call)
    outputs, y = log_p, targets  # log-probabilities are logits too, of the same probabilities
    samples = calls[0].samples if calls else 1
    if len(y) != samples and len(y) % samples == 0:
        outputs, y = log_p.unflatten(0, (samples, -1)).movedim(-1, 1), y.reshape(samples, -1)
    return _reading(F.cross_entropy, outputs, y, options, None)


def _rows_taken(
    call: Call, log_softmax: Any, log_p: Float[Tensor, "p d"], *, classes_last: bool
) -> Tensor | slice | None:
    """Which rows of the call's output the logits are, in order; None if they are not rows of it."""
    if call.edge is None or not call.untouched() or call.weight.shape[0] != log_p.shape[1]:
        return None
    rows: Tensor | slice = slice(None)
    (above, index), z, end = log_softmax.next_functions[0], call.outputs_last(), call.edge.node
    if follow(above, KEEPING, until=end) is end:
        if classes_last and z is call.output and z.numel() == log_p.numel():
            return rows  # nothing but views in between: no need to compare
    elif follow(above, KEEPING + MOVING, until=end) is not end:
        if follow(above, KEEPING + MOVING + SELECTING, until=end) is not end:
            return None
        ones = torch.ones_like(log_softmax._saved_result)
        (marked,) = torch.autograd.grad((GradientEdge(above, index),), (call.edge,), (ones,), retain_graph=True)
        mark = call.kind.outputs_last(call.module, marked).reshape(-1, log_p.shape[1])[:, 0]
        if bool((mark > 1).any()):
            return None
        rows = mark.nonzero()[:, 0]
    with torch.no_grad():
        chosen = z.reshape(-1, z.shape[-1])[rows].to(log_p.dtype)
        same = chosen.shape == log_p.shape and torch.allclose(chosen.log_softmax(-1), log_p, atol=1e-5)
    return rows if same else None


# -- losses of one output each -------------------------------------------------------------------------------

_ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "BinaryCrossEntropyWithLogits": (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    "MseLoss": (F.mse_loss, ()),
}


def _elementwise(node: Any, reduction: str) -> Reading | None:
    function, names = _ELEMENTWISE[operation(node)]
    options = {"reduction": reduction} | {name: getattr(node, f"_saved_{name}") for name in names}
    outputs = node._saved_self
    return _reading(function, outputs, node._saved_target, options, None) if outputs.requires_grad else None


def _reading(
    function: Callable[..., Tensor], outputs: Tensor, targets: Tensor, options: dict[str, Any], call: Call | None
) -> Reading | None:
    known = known_loss(function, outputs, (targets,), options)
    return None if known is None else Reading(known, call)


def _signed(number: int) -> int:
    """Autograd shows saved signed integers as unsigned ones."""
    return number - 2**64 if number >= 2**63 else number
