"""Reads from its graph how a scalar loss was made from logits, for frameworks that compute the loss themselves.

Understood is ``c * loss(z)``: c constants by which the loss was multiplied or divided (accumulation, gradient
scaling, number of tokens), loss one of those of :mod:`relflat.loss.known` with a mean or sum reduction, z the logits.
Targets, class weights and ignored index are the ones autograd saved, so nothing about the batch is guessed.

Understood is too whatever is linear in ``log_softmax(z)`` (smoothed or soft labels, weights of tokens, gathered
log-probabilities): with g its slope there, which does not change, the Hessian in z is that of a cross-entropy whose
rows have the mass ``-sum_c g_c``. Anything else is not described, and goes through automatic differentiation.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from relflat.capture.calls import Call
from relflat.capture.graph import KEEPING, MOVING, SELECTING, ancestors, follow, foreign, operation, signed
from relflat.distributed import not_taken_for_backward
from relflat.loss.known import KnownLoss, known_loss, weighted_cross_entropy
from relflat.rng import Rng

_FEW = 64
_SIDES = {"Mul": ([0], [1]), "Div": ([0],)}  # what a constant may multiply
_REDUCTION = {1: "mean", 2: "sum"}
_Found = tuple[Callable[..., Tensor], Tensor, Tensor, dict[str, Any], Call | None]
"""Function, outputs, targets and options of a loss; the call that gave the outputs."""


class Reading(NamedTuple):
    """What a loss was computed from."""

    known: KnownLoss  # of the logits, or of log-probabilities, whose loss it is too; constants included
    call: Call | None  # which gave the logits, if it is one of those asked about


def read_loss(loss: Tensor, calls: Sequence[Call], outputs: Tensor | None = None) -> Reading | None:
    """Read the graph of a scalar loss, before it is freed, by calls recorded; None if it is not understood.

    Nor if something is computed between ``outputs``, those of the model, and the logits: then the Gauss-Newton matrix
    with respect to the two are different ones.
    """
    if loss.numel() != 1 or loss.grad_fn is None or not bool(torch.isfinite(loss.detach()).all()):
        return None
    first, reading = _by_name(loss, calls)
    if reading is None:
        first = _softmax_above(loss.grad_fn)
        reading = None if first is None else _linear(loss, first, calls)
    return reading if reading is None or reading.call is not None or _led_by(first, outputs) else None


def _by_name(loss: Tensor, calls: Sequence[Call]) -> tuple[Any, Reading | None]:
    """One of the registered losses, and the first operation upon its logits."""
    node, constant = without_constants(loss.grad_fn)
    reduction = _REDUCTION.get(getattr(node, "_saved_reduction", 0), "")
    name = operation(node) if node is not None and reduction and constant > 0 else ""
    bare = node is follow(loss.grad_fn, KEEPING)  # not even divided by what happens to be 1 here
    found = None
    if name in _ELEMENTWISE:
        found = _elementwise(node, reduction)
    elif name in ("NllLoss", "NllLoss2D"):
        found = _cross_entropy(node, reduction, calls, float(loss.detach()) / constant)
        node = follow(node.next_functions[0][0], KEEPING)
    if found is None:
        return node, None
    function, outputs, targets, options, call = found
    known = known_loss(function, outputs, (targets,), options)
    return node, None if known is None else Reading(known if bare else known.times(constant), call)


def _led_by(node: Any, outputs: Tensor | None) -> bool:
    """Whether what goes into the node is the outputs, or they were computed later than it."""
    if outputs is None or outputs.grad_fn is None:
        return True
    end = outputs.grad_fn
    if end._sequence_nr() >= node._sequence_nr():
        return True
    return follow(node.next_functions[0][0], KEEPING + MOVING + SELECTING, until=end) is end


def without_constants(node: Node | None, until: Collection[Node | None] = ()) -> tuple[Any, float]:
    """The operation that made the loss, if it is clear, and the product of the constants that multiply it."""
    constant = 1.0
    while node not in (None, *until) and (kind := operation(node)) in (*KEEPING, "Mul", "Div"):
        side = 0
        assert node is not None
        if kind not in KEEPING:
            live = [i for i, (parent, _) in enumerate(node.next_functions) if parent is not None]
            if live not in _SIDES[kind]:
                return None, constant
            (side,) = live
            factor = getattr(node, ("_saved_other", "_saved_self")[side], None)
            if factor is None or (isinstance(factor, Tensor) and factor.numel() != 1):
                return None, constant
            constant = constant * float(factor) if kind == "Mul" else constant / float(factor)
        node = node.next_functions[side][0]
    return node, constant


def _softmax_above(root: Node) -> Any:
    """The one LogSoftmax that all paths from the loss meet within a few operations; None if there is not one."""
    found: list[Node] = []
    for count, node in enumerate(ancestors(root, past=lambda node: operation(node) != "LogSoftmax")):
        if operation(node) == "LogSoftmax":
            found.append(node)
        elif count > _FEW or not node.next_functions or foreign(node):
            return None  # a long way, a parameter of the loss, or a slope that may only look constant
    return found[0] if len(found) == 1 else None


def _unchanging(slope: Tensor, edge: tuple[GradientEdge]) -> bool:
    """Whether nothing comes of a random direction, to which any curvature would answer."""
    try:
        v = Rng(0, 0).normal(slope.detach())
        (change,) = torch.autograd.grad(slope, edge, v, retain_graph=True, allow_unused=True)
    except RuntimeError:  # an operation without a second derivative (CTC)
        return False
    return change is None or not bool(change.any())


def _linear(loss: Tensor, above: Any, calls: Sequence[Call]) -> Reading | None:
    """A loss whose slope in the log-probabilities is constant."""
    edge = (GradientEdge(above, 0),)
    (slope,) = torch.autograd.grad(loss.sum(), edge, create_graph=True)
    if slope.requires_grad and not _unchanging(slope, edge):  # NllLoss has its input in the graph of its slope
        return None
    saved, dim = above._saved_result, signed(above._saved_dim)
    mass = -slope.detach().sum(dim).reshape(-1)
    if not bool((mass >= 0).all()):
        return None
    log_p = saved.movedim(dim, -1).reshape(len(mass), -1)
    for call in calls:
        rows = _rows_taken(call, above, log_p.detach(), classes_last=dim in (-1, saved.ndim - 1))
        if rows is not None:
            z = call.outputs_last()
            masses = mass.new_zeros(z.shape[:-1].numel())
            masses[rows] = mass
            return Reading(weighted_cross_entropy(z, masses), call)
    samples = calls[0].samples if calls else 1
    if len(mass) != samples and len(mass) % samples == 0:
        log_p = log_p.unflatten(0, (samples, -1))
    return Reading(weighted_cross_entropy(log_p, mass), None)


def _cross_entropy(node: Any, reduction: str, calls: Sequence[Call], value: float) -> _Found | None:
    above = follow(node.next_functions[0][0], KEEPING)
    if above is None or operation(above) != "LogSoftmax":
        return None
    saved, dim = above._saved_result, signed(above._saved_dim)
    log_p = saved.movedim(dim, -1)
    log_p = log_p.reshape(-1, log_p.shape[-1])
    targets, ignored = node._saved_target.reshape(-1), signed(node._saved_ignore_index)
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
