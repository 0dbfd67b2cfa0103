"""Where the weights go in the graph behind a loss, along which dimension they are multiplied; a parameter as W."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from relflat.capture.calls import Call
from relflat.capture.graph import KEEPING, MOVING, Use, ancestors, follow, operation, users
from relflat.capture.kinds import Kind, kind_of, own_weights, transposed_matrix, weight_of
from relflat.errors import LayerError

_VIEWS = (*KEEPING, *MOVING, "Expand", "Select", "Slice", "Split", "SplitWithSizes", "Unbind")
_LEFT, _RIGHT, _REST = "last", "last but one", "all but the first"
# Operations that multiply features with a weight: which of their inputs that may be, and what of it is summed over.
_PRODUCTS: dict[str, dict[int, str]] = {
    "Mm": {0: _LEFT, 1: _RIGHT},
    "Addmm": {1: _LEFT, 2: _RIGHT},
    "Bmm": {0: _LEFT, 1: _RIGHT},
    "Baddbmm": {1: _LEFT, 2: _RIGHT},
    "Mv": {0: _LEFT},
    "Addmv": {1: _LEFT},
    "GroupedMm": {0: _LEFT, 1: _RIGHT},
    "Linear": {1: _LEFT},
    "Convolution": {1: _REST},
    "Embedding": {0: "first"},
    "EmbeddingBag": {0: "first"},
}
View = Callable[[Tensor], Tensor]


def as_stored(w: Tensor) -> Tensor:
    """Rows in the first dimension."""
    return w.flatten(1)


def leaf(parameter: Tensor) -> Node | None:
    """The node of a parameter in any graph; None if it is frozen."""
    return get_gradient_edge(parameter).node if parameter.requires_grad else None


def is_product(use: Use) -> bool:
    """Whether a weight is multiplied with features there."""
    return use.position in _PRODUCTS.get(operation(use.node), ())


def parameter_behind(node: Node | None) -> nn.Parameter | None:
    """The parameter of two dimensions or more that a node views, if it does."""
    found = getattr(follow(node, _VIEWS), "variable", None)
    return found if isinstance(found, nn.Parameter) and found.ndim > 1 else None


class Uses:
    """Where parameters go in the graph of a loss; one walk, kept no longer than the graph."""

    def __init__(self, loss: Tensor) -> None:
        self._users = users(loss.grad_fn)

    @functools.cached_property
    def _derived(self) -> bool:
        """Whether something in the graph is itself a derivative."""
        return any("BackwardBackward" in node.name() for node in self._users)

    def of(self, parameter: Tensor, within: Iterable[Node] = ()) -> Iterator[Use]:
        """Where a parameter goes, past views of it, but not within some nodes."""
        start, within = leaf(parameter), set(within)
        for node in [] if start is None else self._views(start):
            for use in self._users.get(node, ()):
                if operation(use.node) not in _VIEWS and use.node not in within:
                    yield use

    def _views(self, start: Node) -> Iterator[Node]:
        stack = [start]
        while stack:
            yield stack[-1]
            stack += [use.node for use in self._users.get(stack.pop(), ()) if operation(use.node) in _VIEWS]

    def products(self, parameter: Tensor, within: Iterable[Node] = ()) -> list[Use]:
        """Where it is multiplied with features."""
        return [use for use in self.of(parameter, within) if is_product(use)]

    def past(self, calls: Sequence[Call]) -> bool:
        """Whether the weight of a layer leads to the loss in other ways than by the outputs of its calls.

        Another layer's product with the same weight does not count, as a layer that is named means its own use.
        Everything else does: the weight in a norm, and in a derivative of the network, where a product with it is
        one with its transpose.
        """
        inner = inside(calls)
        weights = {w for c in calls for w in own_weights(c.module) if w.requires_grad}
        return any(self._elsewhere(w, inner) or self._turned_back(w, inner) for w in weights)

    def _elsewhere(self, weight: Tensor, inner: set[Node]) -> bool:
        beside = list(self.of(weight, inner))
        return any(not is_product(use) for use in beside) or (bool(beside) and self._derived)

    def _turned_back(self, weight: Tensor, inner: set[Node]) -> bool:
        """Whether a transpose that a call made is used elsewhere too: only the layer's derivative does that."""
        start = leaf(weight)
        turned = [v for v in self._views(start) if v in inner and operation(v) in MOVING] if start else []
        return any(use.node not in inner for v in turned for use in self._users[v])

    def view(self, parameter: Tensor) -> View:
        """A parameter as W of shape (d, m), or a stack of such: what a product sums over is the features.

        A first dimension that is not summed over, beside another one, counts matrices (experts). Where uses disagree,
        or nothing is known of them, it is taken as it is stored, with rows in the first dimension.
        """
        found = {_summed(use, parameter) for use in self.products(parameter)}
        if len(found) != 1:
            return as_stored
        ((features, groups),) = found
        if groups:
            return lambda w: transposed_matrix(groups, w)
        return _with_features_last(parameter.shape, features)


def _with_features_last(shape: Sequence[int], features: Collection[int]) -> View:
    rest = [k for k, size in enumerate(shape) if size > 1 and k not in features]
    stack = rest[:1] if len(rest) > 1 and rest[0] == 0 else []
    order = *rest, *(k for k in range(len(shape)) if k not in rest)
    sizes, d = [shape[k] for k in stack], math.prod(shape[k] for k in rest[len(stack) :])
    return lambda w: w.permute(order).reshape(*sizes, d, -1)


def inside(calls: Sequence[Call]) -> set[Node]:
    """The nodes of the graph between the inputs and the outputs of calls."""
    edges = [(c.edge.node, c.source) for c in calls if c.edge is not None]
    return {node for end, source in edges for node in ancestors(end, [] if source is None else [source])}


def _summed(use: Use, parameter: Tensor) -> tuple[frozenset[int], int]:
    """The dimensions of a parameter that a product sums over; and for a transposed convolution its groups.

    Numbers laid along what the operation sums over are carried back to the parameter: its dimensions along which they
    vary are meant.
    """
    along = _PRODUCTS[operation(use.node)][use.position]
    groups = getattr(use.node, "_saved_groups", 0) if getattr(use.node, "_saved_transposed", False) else 0
    like = use.of._input_metadata[use.number]
    shape, n = tuple(like.shape), len(like.shape)
    wanted = {_LEFT: [n - 1], _RIGHT: [n - 2], _REST: list(range(1, n)), "first": [0]}[along]
    number = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for k in wanted:
        number += (torch.arange(shape[k], device=like.device) % 251).reshape(-1, *[1] * (n - k - 1))
    number, ones = number + 1, torch.ones_like(number)
    if use.of is not leaf(parameter):
        edge = (GradientEdge(use.of, use.number),)
        number, ones = (
            torch.autograd.grad(edge, (get_gradient_edge(parameter),), (x,), retain_graph=True)[0].detach()
            for x in (number, ones)
        )
    number = torch.where(ones > 0, number / ones, torch.nan)
    varies = [k for k in range(number.ndim) if bool((number.diff(dim=k).abs() > 0).any())]
    return frozenset(varies), int(groups)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter seen as W of shape (d, m), or as a stack of such, by ``view``, which moves entries only."""

    layer: str
    parameter: Tensor
    view: View

    @classmethod
    def of(cls, layer: str, target: nn.Module | nn.Parameter, view: View = as_stored) -> "Matrix":
        """The matrix of a tapped module, or parameter by a view of it."""
        if isinstance(target, nn.Parameter):
            return cls(layer, target, view)
        kind, weight = cast(Kind, kind_of(target)), weight_of(target)
        whole = weight._base if weight._is_view() else weight  # a weight may be a view of a parameter (Keras)
        if not isinstance(whole, nn.Parameter) or whole.numel() != weight.numel() or hasattr(target, "lora_A"):
            raise LayerError(
                f"the weight of layer {layer!r} is computed from other parameters (parametrization, adapter), so it "
                "cannot be changed or differentiated as a whole, which is needed as the loss depends on it in other "
                "ways than by the layer's outputs, or all of its uses count; name one of those parameters instead"
            )
        as_weight = (weight.shape, weight.stride())
        return cls(layer, whole, lambda w: kind.matrix(target, w if whole is weight else w.as_strided(*as_weight)))

    def weight(self) -> Float[Tensor, "*s d m"]:
        """W itself."""
        return self.view(self.parameter)

    def back(self, direction: Float[Tensor, "*s d m"]) -> Tensor:
        """A direction in the shape and type of the parameter: the inverse of ``view``, which is its transpose."""
        blank, graph = torch.zeros_like(self.parameter, requires_grad=True), direction.requires_grad
        with torch.enable_grad():
            view = self.view(blank)
            (moved,) = torch.autograd.grad(view, blank, direction.to(blank.dtype), create_graph=graph)
        return moved

    def as_call(self) -> Call:
        """The parameter in the place of a layer's output, as an endpoint of differentiation."""
        problem = None
        if hasattr(self.parameter, "full_tensor"):
            problem = (
                "sharded (FSDP); name a dense or convolutional layer that the network calls, whose curvature is "
                "taken in its output"
            )
        elif not self.parameter.requires_grad:
            problem = "frozen (requires_grad=False); unfreeze it while FAM or the measurement runs"
        if problem:
            raise LayerError(f"the curvature of layer {self.layer!r} is taken in its weight, and that is {problem}")
        p: Any = self.parameter
        return Call(self.layer, None, None, p, p, p, get_gradient_edge(p), (0, 0))  # type: ignore[arg-type]  # no module
