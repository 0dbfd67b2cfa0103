"""What ``"output"`` and globs stand for, found in the graph of the first loss."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from relflat.capture.calls import Call, same_values
from relflat.capture.graph import KEEPING, MOVING, ancestors, operation
from relflat.capture.kinds import own_weights, weight_of
from relflat.capture.resolve import Target
from relflat.capture.uses import Uses, inside, parameter_behind
from relflat.errors import GraphError, LayerError, warn

# Operations that take a parameter of two dimensions or more and are no layer for it: positions, scales, norms.
_PASSED = (*KEEPING, *MOVING, "Add", "Cat", "Div", "Expand", "Index", "Mul", "Select", "Slice", "Sub", "Where")


def output_layer(loss: Tensor, source: Tensor | None, calls: Sequence[Call], names: Mapping[int, str]) -> str:
    """The layer that a loss was computed from, by way of ``source`` if that is known.

    Of all calls that were recorded, or else a parameter, whose name stands under its id.

    Raises:
        LayerError: it is not one of the layers that were called, or not one alone.
    """
    tensor = source if source is not None and source.grad_fn in set(ancestors(loss.grad_fn)) else loss
    ends = {c.layer: None for c in calls if _ends_in(c, tensor)} or dict.fromkeys(_reached(tensor, calls, names))
    if not ends:
        raise GraphError(
            "'output' is not found: the loss does not depend on a layer in the last forward pass of the model; give "
            "the criterion the outputs of that very pass, not detached and not of another model, or name the layer"
        )
    only = next(iter(ends))
    if len(ends) > 1:
        raise LayerError(
            f"'output' is ambiguous: {sorted(ends)} all feed what the loss was computed from; name one of them"
        )
    if only not in {c.layer for c in calls} and not _used_once(only, names, loss):
        raise LayerError(
            f"'output' is no layer that was called: the loss was computed from a product with parameter {only!r}, "
            f"which has other uses too; name that: layer={only!r}"
        )
    return only


def _used_once(name: str, names: Mapping[int, str], loss: Tensor) -> bool:
    """Whether a parameter's only way to the loss is one product, so that it is a layer of its own."""
    uses = Uses(loss)
    found = (parameter_behind(node) for node in ancestors(loss.grad_fn) if hasattr(node, "variable"))
    mine = [p for p in found if p is not None and names.get(id(p)) == name]
    return any(len(uses.products(p)) == len(list(uses.of(p))) == 1 for p in mine)


def _reached(tensor: Tensor, calls: Sequence[Call], names: Mapping[int, str]) -> Iterator[str]:
    """The layers and multiplied parameters that come first on the ways back from a tensor."""
    edges = {c.edge.node: c.layer for c in calls if c.edge is not None}

    def name_at(node: Node) -> str | None:
        return edges[node] if node in edges else _parameter_of(node, names)

    found = map(name_at, ancestors(tensor.grad_fn, past=lambda node: name_at(node) is None))
    return (name for name in found if name is not None)


def _parameter_of(node: Node, names: Mapping[int, str]) -> str | None:
    """The name of the parameter that an operation multiplies with; None if it does not."""
    if operation(node) in _PASSED:
        return None
    weights = [parameter_behind(parent) for parent, _ in node.next_functions]
    return next((names[id(w)] for w in reversed(weights) if id(w) in names), None)


def _ends_in(call: Call, tensor: Tensor) -> bool:
    """Whether the tensor is the output of the call, perhaps with the classes moved."""
    moved = tensor.movedim(1, -1) if tensor.ndim > 2 else tensor
    pairs = ((tensor, call.output), (moved, call.output), (moved, call.outputs_last()))
    return any(same_values(call, mine, other) for mine, other in pairs)


def taking_part(
    candidates: Mapping[str, Target], calls: Sequence[Call], uses: Uses, *, features: bool
) -> dict[str, Target]:
    """Every weight matrix among candidates that the loss depends on, once: modules that were called, and parameters.

    A weight that several modules share, or that is multiplied beside the calls of its module too, stands as a
    parameter, with all of its uses. A parameter that is not multiplied with features (a position, a token) is none.

    Calls are those that the loss depends on, uses those of the parameters in its graph; with ``features`` only
    modules that were called with features of real numbers will do.
    """
    found: dict[str, Target] = {}
    left, seen = [], set()
    for name, target in candidates.items():
        mine = [c for c in calls if c.layer == name]
        stands = _stands_as(name, target, mine, candidates, None if features else uses)
        if not stands:
            left.append(name)
        elif id(weight_of(target)) not in seen:
            seen.add(id(weight_of(target)))
            found |= stands
    if not found:
        raise LayerError(f"none of {left} took part in the first forward pass as a layer; name another")
    if left:
        warn(f"left out for good, as the first loss does not depend on them by a product of their own: {left}")
    return found


def _stands_as(
    name: str, target: Target, mine: Sequence[Call], candidates: Mapping[str, Target], uses: Uses | None
) -> dict[str, Target]:
    """A candidate under its name or that of its weight; empty if it took no part."""
    weight: Any = weight_of(target)
    free = isinstance(weight, nn.Parameter) and weight.requires_grad and not hasattr(target, "lora_A")
    beside = uses.products(weight, inside(mine)) if free and uses is not None else []
    if not (mine or beside) or not _fit(mine, free=free, features=uses is None):
        return {}
    if beside and (mine or _shared(weight, candidates)):
        return {name if weight is target else f"{name}.weight".lstrip("."): weight}
    return {name: target}


def _fit(calls: Sequence[Call], *, free: bool, features: bool) -> bool:
    """Whether a layer's kappa can be taken as it was called."""
    return all(
        not c.kind.problem(c.module) and (c.linear or free) and (c.phi.is_floating_point() or not features)
        for c in calls
    )


def _shared(weight: Tensor, candidates: Mapping[str, Target]) -> bool:
    modules = [m for m in candidates.values() if isinstance(m, nn.Module)]
    return sum(any(w is weight for w in own_weights(m)) for m in modules) > 1
