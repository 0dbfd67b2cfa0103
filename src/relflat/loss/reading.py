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
from relflat.distributed import not_taken_for_backward
from relflat.loss.known import KnownLoss, known_loss

_REDUCTION = {1: "mean", 2: "sum"}
_Found = tuple[Callable[..., Tensor], Tensor, Tensor, dict[str, Any], Call | None]
"""Function, outputs, targets and options of a loss; the call that gave the outputs."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a loss was computed from."""

    known: KnownLoss  # of the logits, or of log-probabilities, whose loss it is too; constants included
    call: Call | None  # which gave the logits, if it is one of those asked about


def read_loss(loss: Tensor, calls: Sequence[Call]) -> Reading | None:
    """Read the graph of a scalar loss, before it is freed, by calls recorded; None if it is not understood."""
    if loss.numel() != 1 or not bool(torch.isfinite(loss.detach()).all()):
        return None
    node, constant = _without_constants(loss.grad_fn)
    reduction = _REDUCTION.get(getattr(node, "_saved_reduction", 0))
    if node is None or reduction is None or not constant > 0:
        return None
    name = operation(node)
    if name in ("NllLoss", "NllLoss2D"):
        found = _cross_entropy(node, reduction, calls, float(loss.detach()) / constant)
    else:
        found = _elementwise(node, reduction) if name in _ELEMENTWISE else None
    if found is None:
        return None
    function, outputs, targets, options, call = found
    known = known_loss(function, outputs, (targets,), options)
    return None if known is None else Reading(known.times(constant), call)


def _without_constants(node: Node | None) -> tuple[Any, float]:
    """The operation that made the loss, if it is clear, and the product of the constants that multiply it."""
    constant = 1.0
    while node is not None and (kind := operation(node)) in (*KEEPING, "Mul", "Div"):
        side = 0
        if kind not in KEEPING:
            live = [i for i, (parent, _) in enumerate(node.next_functions) if parent is not None]
            if live not in ([0], [1]) or (kind, live) == ("Div", [1]):
                return None, constant
            (side,) = live
            factor = getattr(node, ("_saved_other", "_saved_self")[side], None)
            if factor is None or (isinstance(factor, Tensor) and factor.numel() != 1):
                return None, constant
            constant = constant * float(factor) if kind == "Mul" else constant / float(factor)
        node = node.next_functions[side][0]
    return node, constant


def _cross_entropy(node: Any, reduction: str, calls: Sequence[Call], value: float) -> _Found | None:
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
        rows = _rows_taken(call, above, log_p.detach(), classes_last=dim in (-1, saved.ndim - 1))
        if rows is not None:
            z = call.outputs_last()
            y = torch.full(z.shape[:-1], ignored, dtype=targets.dtype, device=targets.device)
            y.view(-1)[rows] = targets
            return F.cross_entropy, z.movedim(-1, 1) if z.ndim > 1 else z, y, options, call
    outputs, y = log_p, targets  # log-probabilities are logits too, of the same probabilities
    samples = calls[0].samples if calls else 1
    if len(y) != samples and len(y) % samples == 0:
        outputs, y = log_p.unflatten(0, (samples, -1)).movedim(-1, 1), y.reshape(samples, -1)
    return F.cross_entropy, outputs, y, options, None


def _rows_taken(
    call: Call, log_softmax: Any, log_p: Float[Tensor, "p d"], *, classes_last: bool
) -> Tensor | slice | None:
    """Which rows of the call's output the logits are, in order; None if they are not rows of it."""
    if call.edge is None or not call.untouched() or call.weight.shape[0] != log_p.shape[1]:
        return None
    rows: Tensor | slice | None = slice(None)
    (above, _), z, end = log_softmax.next_functions[0], call.outputs_last(), call.edge.node
    if follow(above, KEEPING, until=end) is end:
        if classes_last and z is call.output and z.numel() == log_p.numel():
            return rows  # nothing but views in between: no need to compare
    elif follow(above, KEEPING + MOVING, until=end) is not end:
        selected = follow(above, KEEPING + MOVING + SELECTING, until=end) is end
        rows = _rows_marked(call, log_softmax) if selected else None
    return rows if rows is not None and _same_probabilities(z, rows, log_p) else None


def _same_probabilities(z: Tensor, rows: Tensor | slice, log_p: Tensor) -> bool:
    with torch.no_grad():
        chosen = z.reshape(-1, z.shape[-1])[rows].to(log_p.dtype)
        return chosen.shape == log_p.shape and torch.allclose(chosen.log_softmax(-1), log_p, atol=1e-5)


def _rows_marked(call: Call, log_softmax: Any) -> Tensor | None:
    """Rows of the call's output that reach the softmax, as a gradient of ones comes back to them; None if twice."""
    start, ones = GradientEdge(*log_softmax.next_functions[0]), torch.ones_like(log_softmax._saved_result)
    assert call.edge is not None
    with not_taken_for_backward():
        (marked,) = torch.autograd.grad((start,), (call.edge,), (ones,), retain_graph=True)
    mark = call.kind.outputs_last(call.module, marked).reshape(-1, call.weight.shape[0])[:, 0]
    return None if bool((mark > 1).any()) else mark.nonzero()[:, 0]


_ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "BinaryCrossEntropyWithLogits": (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    "MseLoss": (F.mse_loss, ()),
}


def _elementwise(node: Any, reduction: str) -> _Found | None:
    function, names = _ELEMENTWISE[operation(node)]
    options = {"reduction": reduction} | {name: getattr(node, f"_saved_{name}") for name in names}
    outputs = node._saved_self
    return (function, outputs, node._saved_target, options, None) if outputs.requires_grad else None


def _signed(number: int) -> int:
    """Autograd shows saved signed integers as unsigned ones."""
    return number - 2**64 if number >= 2**63 else number
