"""Whether samples influence each other after a layer (BatchNorm in training mode, contrastive losses).

Where they do not, the curvature is block-diagonal over samples: every sample is a group with directions of its own.
Most operations are known to leave samples apart, or not to (:func:`followed`). Where one is not known, derivatives are
asked: a direction that is zero on some samples has an image that is zero there too, exactly, unless samples are
coupled. Any two samples are told apart by one of ``log2 n`` directions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.autograd.graph import Node

from relflat.capture.calls import Call
from relflat.capture.graph import foreign, operation
from relflat.curvature.operators import Operator, pull
from relflat.rng import Rng

_LEAK = 1e-6  # what counts as exactly zero, relative to the response of a sample itself
_REORDERING = ("Flip", "Gather", "Roll", "Scatter", "ScatterAdd", "Sort", "Take", "Topk")
APART, UNKNOWN, COUPLED = 0, 1, 2


def may_reorder(node: Any) -> bool:
    """Whether an operation may put samples, its first dimension, in an order of its own each time it runs."""
    name = operation(node)
    if name == "Index":
        first = node._saved_indices[0]
        return first is not None and not (
            first.ndim == 1 and torch.equal(first, torch.arange(len(first), device=first.device))
        )
    dims = getattr(node, "_saved_dims", getattr(node, "_saved_dim", 0))
    return name.startswith(("Index", *_REORDERING)) and (dims in (0, ()) or (isinstance(dims, tuple) and 0 in dims))


# -- by names of operations -----------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where samples are in a tensor: index k of a dimension is of sample ``k // inner % n``. Nowhere in a sum."""

    dim: int
    inner: int = 1


_SUM = Place(-1)  # a number, linear in a sum over samples
Given = Sequence[tuple[int, Place, tuple[int, ...]]]
"""Of each input that has samples: which it is, where they are, its shape."""
Rule = Callable[[Any, Given, tuple[int, ...], int], "Place | tuple[()] | None"]
"""``(node, given, shape of the outcome, n) ->`` where samples are now; () if they met, None if that is not known."""


def _one_by_one(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    """Number by number; what is smaller is repeated."""
    if any(place == _SUM for _, place, _ in given):
        linear = ("Add", "Sub", "Neg") if len(given) > 1 else ("Add", "Sub", "Neg", "Mul", "Div"[3 * given[0][0] :])
        return _SUM if operation(node) in linear and all(place == _SUM for _, place, _ in given) else None
    found = {(p.dim - len(s) + len(out), p.inner, s[p.dim]) for _, p, s in given}
    if len(found) > 1:
        return None
    dim, inner, size = found.pop()
    return Place(dim, inner) if out[dim] == size else None


def _copied(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    """In the same row-major order."""
    _, place, shape = given[0]
    if place == _SUM:
        return _SUM
    return _found(place.inner * math.prod(shape[place.dim + 1 :]), out, n)


def _found(flat: int, shape: Sequence[int], n: int) -> Place | None:
    """The dimension of samples where number k of all, in row-major order, is of sample ``k // flat % n``."""
    for dim, size in enumerate(shape):
        rest = math.prod(shape[dim + 1 :])
        if rest <= flat:
            return Place(dim, flat // rest) if flat % rest == 0 and size % (n * flat // rest) == 0 else None
    return None


def _turned(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    """With dimensions in another order."""
    _, place, shape = given[0]
    order = list(range(len(shape)))
    if operation(node) == "Permute":
        order = _dims(node._saved_dims, len(shape))
    else:
        pair = (0, len(shape) - 1) if operation(node) == "T" else (node._saved_dim0, node._saved_dim1)
        a, b = _dims(pair, len(shape))
        order[a], order[b] = order[b], order[a]
    return place._replace(dim=order.index(place.dim))


def _along(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    """Along a dimension that is not that of the samples."""
    _, place, shape = given[0]
    dims, whole = _dims(getattr(node, "_saved_dim", None), len(shape)), out == shape and operation(node) == "Slice"
    return place if whole or (dims and place.dim not in dims) else None


def _without(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    """Without some dimensions."""
    _, place, shape = given[0]
    if not out and operation(node) in ("Sum", "Mean"):
        return _SUM
    dims = _dims(getattr(node, "_saved_dim", ()), len(shape))
    if place == _SUM or place.dim in dims or not dims:
        return None
    return place if len(out) == len(shape) else place._replace(dim=place.dim - sum(d < place.dim for d in dims))


def _rows(which: int) -> Rule:
    """Rows, in an input, times a weight."""

    def rule(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
        position, place, shape = given[0]
        return place if position == which and place.dim < len(shape) - 1 else None

    return rule


def _first(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    """Each index of the first dimension by itself."""
    return given[0][1] if given[0][0] == 0 and given[0][1].dim == 0 else None


def _normed(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    position, place, shape = given[0]
    return place if position == 0 and place.dim < len(shape) - len(node._saved_normalized_shape) else None


def _batch_normed(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | tuple[()] | None:
    """Apart in evaluation mode, and where samples are channels (instance normalisation)."""
    position, place, _ = given[0]
    return None if position else () if node._saved_training and place.dim != 1 else place


def _lost(node: Any, given: Given, out: tuple[int, ...], n: int) -> Place | None:
    return _SUM if not out and given[0][0] == 0 else None


def _dims(saved: Any, ndim: int) -> list[int]:
    """Saved dimensions, which autograd shows unsigned, as numbers from 0 on."""
    each = saved if isinstance(saved, tuple | list) else () if saved is None else (saved,)
    return [(d - 2**64 if d >= 2**63 else d) % max(ndim, 1) for d in each]


_NAMES: dict[Rule, str] = {
    _one_by_one: "Relu Tanh Sigmoid Gelu Silu Elu LeakyRelu Softplus Hardtanh Hardswish Hardsigmoid Mish Celu Exp Expm1 "
    "Log Log1P Sqrt Rsqrt Reciprocal Pow Neg Abs Sin Cos Erf Clamp ClampMin ClampMax Threshold LogSigmoid NativeDropout "
    "MaskedFill Where Mul Add Sub Rsub Div Addcmul Addcdiv Lerp Maximum Minimum Expand",
    _copied: "View UnsafeView ReshapeAlias Alias Clone ToCopy Squeeze Unsqueeze _DDPSink",
    _turned: "T Transpose Permute",
    _along: "Softmax SafeSoftmax LogSoftmax Glu Cat Split SplitWithSizes Cumsum Slice Logcumsumexp",
    _without: "Sum Mean Amax Amin Var Std Logsumexp LinalgVectorNorm Select Unbind",
    _first: "Convolution Bmm NativeGroupNorm MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D "
    "AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D ConstantPadNd ReflectionPad2D ReplicationPad2D "
    "UpsampleNearest2D UpsampleBilinear2D ScaledDotProductEfficientAttention ScaledDotProductFlashAttention "
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductCudnnAttention",
    _rows(0): "Mm Linear",
    _rows(1): "Addmm",
    _normed: "NativeLayerNorm FusedRmsNorm",
    _batch_normed: "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm",
    _lost: "NllLoss NllLoss2D MseLoss BinaryCrossEntropyWithLogits SmoothL1Loss HuberLoss",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_SEVERAL, _SUMS = (_one_by_one, _along, _first), (_one_by_one, _copied, _without)  # what they may be given


def _passed(node: Any, given: Given, n: int) -> Place | tuple[()] | None:
    rule, places = _RULES.get(operation(node)), {place for _, place, _ in given}
    if rule is None or foreign(node) or (len(given) > 1 and rule not in _SEVERAL):
        return None
    if (_SUM in places and rule not in _SUMS) or (len(places) > 1 and rule is not _one_by_one):
        return None
    return rule(node, given, tuple(node._input_metadata[0].shape), n)


def followed(root: Node | None, calls: Sequence[Call]) -> dict[str, int]:
    """How far samples stay apart on the ways from the outputs of layers to the end of a graph.

    Args:
        root: the end.
        calls: those of the layers, all of one number of samples.
    """
    order, users, n = in_order(root), dict[Node, list[Node]](), calls[0].samples
    starts: dict[Any, Place | None] = {}
    for c in calls:
        if c.edge is not None:
            shape = tuple(c.edge.node._input_metadata[c.edge.output_nr].shape)  # type: ignore[attr-defined]
            starts[c.edge.node] = _found(c.output.numel() // n, shape, n)
    places: dict[Any, Place | None] = {}
    met: dict[Node, int] = {}
    for node in order:
        inputs = [(k, p, number) for k, (p, number) in enumerate(node.next_functions) if p in places]
        if inputs:
            given = [(k, place, tuple(p._input_metadata[i].shape)) for k, p, i in inputs if (place := places[p])]  # type: ignore[attr-defined]
            found = _passed(node, given, n) if len(given) == len(inputs) else None
            met[node] = UNKNOWN if found is None else APART if found else COUPLED
            places[node] = found or None
            for _, p, _ in inputs:
                users.setdefault(p, []).append(node)
        if node in starts:
            places[node] = starts[node]
    after: dict[Node, int] = {}
    for node in reversed(order):
        after[node] = max((max(met[user], after[user]) for user in users.get(node, ())), default=APART)
    states = {c.layer: APART for c in calls}
    for c in calls:
        states[c.layer] = max(states[c.layer], UNKNOWN if c.edge is None else after.get(c.edge.node, UNKNOWN))
    return states


def in_order(root: Node | None) -> list[Node]:
    """All nodes of a graph, each after those it was computed from."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node | None, bool]] = [(root, False)]
    while stack:
        node, left = stack.pop()
        if node is not None and left:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((parent, False) for parent, _ in node.next_functions)]
    return order


# -- by derivatives -------------------------------------------------------------------------------------------


def coupled_in_products(operator: Operator, calls: Sequence[Call], rng: Rng, *, once: bool = False) -> bool:
    """Ask products with the curvature. Cost: ``log2 n`` of them, or one with a random split."""

    def respond(own: Bool[Tensor, " n"]) -> list[Tensor]:
        directions = []
        for call in calls:
            u = rng.signs(tuple(call.rows(call.output).shape), call.output)
            u[~own] = 0
            directions.append(call.from_rows(u))
        return operator(directions)

    return any(_leaks(calls, respond(own), own) for own in _splits(calls[0], rng, once))


def coupled_in_outputs(
    outputs: Tensor, layers: Mapping[str, Sequence[Call]], rng: Rng, *, once: bool = False
) -> dict[str, bool]:
    """Ask first derivatives of the outputs, of all layers (of one number of samples) at once.

    Cost: ``2 log2 n`` backward passes of what comes after the first layer, or two.
    """
    calls = [c for mine in layers.values() for c in mine]
    if outputs.ndim == 0 or outputs.shape[0] != calls[0].samples:
        return dict.fromkeys(layers, True)  # no telling which output is of which sample; one group is always right
    found = dict.fromkeys(layers, False)
    for half in _splits(calls[0], rng, once):
        for own in (half, ~half):
            r = rng.signs(tuple(outputs.shape), outputs)
            r[~own] = 0
            pulled = iter(pull([outputs], calls, [r], create_graph=False))
            for layer, mine in layers.items():
                response = [next(pulled) for _ in mine]
                found[layer] = found[layer] or _leaks(mine, response, own)
    return found


def _leaks(calls: Sequence[Call], response: Sequence[Tensor], own: Bool[Tensor, " n"]) -> bool:
    """Whether something comes out at samples where nothing was put in."""
    sizes = [c.rows(x.detach()).abs().flatten(1) for c, x in zip(calls, response, strict=True)]
    size = torch.cat(sizes, dim=1)
    return size.numel() > 0 and bool(size[~own].max() > _LEAK * size[own].max())


def _splits(call: Call, rng: Rng, once: bool) -> Iterator[Bool[Tensor, " n"]]:
    """Splits of the samples in two, by the binary digits of their numbers; or one, at random."""
    if once:
        half = rng.signs((call.samples,), call.output.detach().float()) > 0
        half[0], half[-1] = True, False
        yield half
        return
    numbers = torch.arange(call.samples, device=call.output.device)
    for digit in range((call.samples - 1).bit_length()):
        yield numbers.bitwise_right_shift(digit).bitwise_and(1).bool()
