"""Whether samples influence each other after a layer (BatchNorm in training mode, contrastive losses).

Where they do not, the curvature is block-diagonal over samples: every sample is a group with directions of its own.
Most operations are known to leave samples apart, or not to (:func:`followed`). Where one is not known derivatives are
asked: a direction that is zero on some samples has an image that is zero there too, exactly, unless samples are
coupled. Any two samples are told apart by one of ``log2 n`` directions.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.autograd.graph import Node

from relflat.capture.calls import Call
from relflat.capture.graph import foreign, in_order, operation, signed
from relflat.capture.hooks import remove
from relflat.curvature.operators import Operator, pull
from relflat.rng import Rng

_LEAK = 1e-6  # what counts as exactly zero, relative to the response of a sample itself
APART, UNKNOWN, COUPLED = 0, 1, 2


class Place(NamedTuple):
    """Where samples are in a tensor: index k of a dimension is of sample ``k // inner % n``."""

    dim: int
    inner: int = 1


_SUM = Place(-1)  # nowhere: a number, linear in a sum over samples
_MET: tuple[()] = ()  # samples influence each other


class Passed(NamedTuple):
    """An operation with its inputs that have samples: which they are, where samples are in each, their shapes."""

    node: Any
    name: str
    positions: list[int]
    places: list[Place]
    shapes: list[tuple[int, ...]]
    out: tuple[int, ...]
    n: int

    def dims(self, *names: str) -> list[int]:
        """Saved dimensions, which autograd shows unsigned, as numbers from 0 on; none if they are not saved."""
        saved = [getattr(self.node, f"_saved_{name}", None) for name in names]
        each = [d for x in saved if x is not None for d in (x if isinstance(x, tuple | list) else (x,))]
        return [signed(d) % max(len(self.shapes[0]), 1) for d in each]


Rule = Callable[[Passed], "Place | tuple[()] | None"]
"""Where samples are in what an operation gives; None if that is not known."""


def _one_by_one(op: Passed) -> Place | None:
    """Number by number; what is smaller is repeated."""
    if _SUM in op.places:
        times = ("Mul", "Div"[3 * op.positions[0] :]) if len(op.places) == 1 else ()
        linear = ("Add", "Sub", "Rsub", "Neg", *times)
        return _SUM if op.name in linear and set(op.places) == {_SUM} else None
    found = {(p.dim - len(s) + len(op.out), p.inner, s[p.dim]) for p, s in zip(op.places, op.shapes, strict=True)}
    (dim, inner, size), more = found.pop(), bool(found)
    return None if more or op.out[dim] != size else Place(dim, inner)


def _copied(op: Passed) -> Place | None:
    """In the same row-major order."""
    (place,), (shape,) = op.places, op.shapes
    return _SUM if place == _SUM else _located(place.inner * math.prod(shape[place.dim + 1 :]), op.out, op.n)


def _located(flat: int, shape: Sequence[int], n: int) -> Place | None:
    """Where samples are if number k of all, in row-major order, is of sample ``k // flat % n``."""
    for dim, size in enumerate(shape):
        rest = math.prod(shape[dim + 1 :])
        if rest <= flat:
            return Place(dim, flat // rest) if flat % rest == 0 and size % (n * flat // rest) == 0 else None
    return None


def _turned(op: Passed) -> Place:
    """With dimensions in another order."""
    order = list(range(len(op.out)))
    if op.name == "Permute":
        order = op.dims("dims")
    else:
        a, b = op.dims("dim0", "dim1") or (0, len(op.out) - 1)
        order[a], order[b] = order[b], order[a]
    return op.places[0]._replace(dim=order.index(op.places[0].dim))


def _along(op: Passed) -> Place | None:
    """Within a dimension."""
    dims, same = op.dims("dim", "dims"), op.out == op.shapes[0] and op.name == "Slice"
    return op.places[0] if same or (dims and op.places[0].dim not in dims) else None


def _indexed(op: Passed) -> Place | None:
    """By indices of dimensions next to each other, after that of the samples."""
    used = [k for k, index in enumerate(op.node._saved_indices) if index is not None]
    return op.places[0] if op.places[0].dim == 0 < used[0] and used[-1] - used[0] == len(used) - 1 else None


def _without(op: Passed) -> Place | None:
    """Without some dimensions."""
    if not op.out and op.name in ("Sum", "Mean"):
        return _SUM
    place, dims = op.places[0], op.dims("dim")
    if place == _SUM or place.dim in dims or not dims:
        return None
    gone = 0 if len(op.out) == len(op.shapes[0]) else sum(d < place.dim for d in dims)  # else they have size 1
    return place._replace(dim=place.dim - gone)


def _batch_normed(op: Passed) -> Place | tuple[()] | None:
    """Apart in evaluation mode, and where samples are channels (instance normalisation)."""
    return None if op.positions[0] else _MET if op.node._saved_training and op.places[0].dim != 1 else op.places[0]


def _kept(position: int, before: Callable[[Passed], int]) -> Rule:
    """Where they are in one input, if that is in one of so many dimensions."""
    return lambda op: op.places[0] if op.positions[0] == position and op.places[0].dim < before(op) else None


def _padded(op: Passed) -> Place | None:
    """In other dimensions, which are counted from the last."""
    at = 2 * (len(op.out) - 1 - op.places[0].dim)
    return None if any(op.node._saved_pad[at : at + 2]) else op.places[0]


def _reduced(op: Passed) -> Place | None:
    return None if op.out or op.positions[0] else _SUM


_NAMES: dict[Rule, str] = {
    _one_by_one: """
        Relu Tanh Sigmoid Gelu Silu Elu LeakyRelu Softplus Hardtanh Hardswish Hardsigmoid Mish Celu Exp Expm1 Log
        Log1P Sqrt Rsqrt Reciprocal Pow Neg Abs Sin Cos Erf Clamp ClampMin ClampMax Threshold LogSigmoid NativeDropout
        MaskedFill Where Mul Add Sub Rsub Div Addcmul Addcdiv Lerp Maximum Minimum Expand""",
    _copied: "View UnsafeView ReshapeAlias Alias Clone ToCopy Squeeze Unsqueeze _DDPSink",
    _turned: "T Transpose Permute",
    _along: """
        Softmax SafeSoftmax LogSoftmax Glu Cat Split SplitWithSizes Cumsum Slice Logcumsumexp Flip Roll Gather Sort
        IndexSelect Topk""",
    _indexed: "Index",
    _without: "Sum Mean Amax Amin Var Std Logsumexp LinalgVectorNorm Select Unbind",
    _kept(0, lambda op: 1): """
        Convolution Bmm NativeGroupNorm MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D
        AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D ReflectionPad2D ReplicationPad2D
        UpsampleNearest2D UpsampleBilinear2D ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
        ScaledDotProductFlashAttentionForCpu ScaledDotProductCudnnAttention""",
    _kept(0, lambda op: len(op.out) - 1): "Mm Linear",
    _kept(1, lambda op: len(op.out) - 1): "Addmm",
    _kept(0, lambda op: len(op.out) - len(op.node._saved_normalized_shape)): "NativeLayerNorm FusedRmsNorm",
    _batch_normed: "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm",
    _padded: "ConstantPadNd",
    _reduced: "NllLoss NllLoss2D MseLoss BinaryCrossEntropyWithLogits SmoothL1Loss HuberLoss",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_SUMS, _SEVERAL = (_one_by_one, _copied, _without), ("Bmm", "Cat", "Scaled")  # which rules, and which operations


def _passed(op: Passed) -> Place | tuple[()] | None:
    rule = _RULES.get(op.name)
    if rule is None or foreign(op.node) or None in op.places or (_SUM in op.places and rule not in _SUMS):
        return None
    alike = len(op.places) == 1 or (op.name.startswith(_SEVERAL) and len(set(op.places)) == 1)
    return rule(op) if alike or rule is _one_by_one else None


def followed(root: Node | None, calls: Sequence[Call]) -> tuple[dict[str, bool], dict[Node, int]]:
    """Whether samples meet on the ways from layers, called on as many each, to a graph's end, if known; and where."""
    order, n = in_order(root), calls[0].samples
    ends = {c.edge.node: _shape(*c.edge[:2]) for c in calls if c.edge is not None}  # of outputs, or what those view
    places: dict[Any, Any] = {}
    met: dict[Node, int] = {}
    for node in order:
        given = [(k, *edge) for k, edge in enumerate(node.next_functions) if edge[0] in places]
        if given:
            found = _passed(_operation_on(node, given, places, n))
            met[node] = UNKNOWN if found is None else COUPLED if found == _MET else APART
            places[node] = found or None
        if node in ends:
            shape = ends[node]
            located = _located(math.prod(shape) // n, shape, n)
            if places.get(node) not in (None, located):
                met[node] = UNKNOWN  # samples of an earlier layer are elsewhere in it
            places[node] = located
    return _worst(calls, order, met), met


def _operation_on(node: Node, given: Sequence[tuple[int, Any, int]], places: Mapping[Any, Any], n: int) -> Passed:
    """A node with its inputs that come from layers: which, from where, and where the samples are in them."""
    where, shapes = [places[p] for _, p, _ in given], [_shape(p, i) for _, p, i in given]
    return Passed(node, operation(node), [k for k, _, _ in given], where, shapes, _shape(node, 0), n)


def _worst(calls: Sequence[Call], order: Sequence[Node], met: Mapping[Node, int]) -> dict[str, bool]:
    """The worst that happens on the ways from each layer, from what happens at each node, where it is known."""
    after: dict[Any, int] = dict.fromkeys(order, APART)
    for node in reversed(order):
        for parent, _ in node.next_functions:
            after[parent] = max(after.get(parent, APART), after[node], met.get(node, APART))
    states = [(c.layer, UNKNOWN if c.edge is None else after.get(c.edge.node, UNKNOWN)) for c in calls]
    worst = {layer: max(state for name, state in states if name == layer) for layer, _ in states}
    return {layer: state == COUPLED for layer, state in worst.items() if state != UNKNOWN}


def _shape(node: Any, number: int) -> tuple[int, ...]:
    return tuple(node._input_metadata[number].shape)


def may_reorder(node: Any) -> bool:
    """Whether an operation may put samples, its first dimension, in an order of its own each time it runs."""
    name = operation(node)
    if name == "Index":
        first = node._saved_indices[0]
        return first is not None and not (
            first.ndim == 1 and torch.equal(first, torch.arange(len(first), device=first.device))
        )
    dims = getattr(node, "_saved_dims", getattr(node, "_saved_dim", 0))
    reorders = name.startswith(("Index", "Flip", "Gather", "Roll", "Scatter", "Sort", "Take", "Topk"))
    return reorders and (dims in (0, ()) or (isinstance(dims, tuple) and 0 in dims))


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
    for own in (split for half in _splits(calls[0], rng, once) for split in (half, ~half)):
        r = rng.signs(tuple(outputs.shape), outputs)
        r[~own] = 0
        pulled = iter(pull([outputs], calls, [r], create_graph=False))
        for layer, mine in layers.items():
            response = [next(pulled) for _ in mine]
            found[layer] = found[layer] or _leaks(mine, response, own)
    return found


def unreached(root: Tensor, calls: Sequence[Call], met: Mapping[Node, int], rng: Rng) -> bool:
    """Whether no gradient comes to an unknown operation between calls and ``root``: a gate at 0, a hinge at rest.

    What that does to the samples is not seen in derivatives, and may be later. Cost: a backward pass.
    """
    nodes, reached = [node for node in met if met[node] == UNKNOWN], set[Node]()

    def look(node: Node, gradients: Sequence[Tensor | None]) -> None:
        if any(g is not None and bool(g.any()) for g in gradients):
            reached.add(node)

    handles = [node.register_prehook(functools.partial(look, node)) for node in nodes]
    try:
        pull([root], calls, [rng.signs(tuple(root.shape), root)], create_graph=False)
    finally:
        remove({"": handles})
    return len(reached) < len(nodes)


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
