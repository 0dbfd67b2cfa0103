"""What a forward pass leaves behind: the calls of the tapped layers, and what was computed from them."""

import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_leaves

from relflat.capture.graph import KEEPING, MOVING, ancestors, follow, same_memory
from relflat.capture.kinds import Kind, as_rows, parametrization_of, weight_of
from relflat.errors import GraphError, LayerError, warn
from relflat.rng import RngState

_FEW, _MANY, _MOST = 8, 64, 1024  # waiting passes: kept as they are, worth a warning, too many


@dataclass(slots=True, eq=False)
class Call:
    """One call of a tapped layer within a forward pass: input, output and weight as they were at that moment."""

    layer: str
    module: nn.Module
    kind: Kind
    phi: Tensor
    weight: Float[Tensor, "d m"]
    output: Tensor  # what it returned; may have been overwritten in place since
    edge: GradientEdge | None  # where to take gradients in the output, overwritten or not; None under no_grad
    versions: tuple[int, int]  # of input and output at that moment
    tied: bool = False  # whether another module has the same weight
    source: Node | None = None  # what made the input, before anything overwrote it
    stored: Tensor | None = None  # the weight as the module had it
    linear: bool = True  # whether the output is W phi + b; if not, curvature is taken in the weight

    @property
    def samples(self) -> int:
        """How many samples the call saw; one if it had no batch dimension."""
        if self.output.is_nested:
            raise LayerError(
                f"the output of layer {self.layer!r} is a nested tensor, which has no rows of one shape; name a "
                "layer that runs on padded or packed tensors, or after pooling"
            )
        last = self.outputs_last()
        return last.shape[0] if last.ndim > 1 else 1

    def own_module(self) -> nn.Module:
        """The module, after checking that it was called with a weight of its own."""
        weight = None if parametrization_of(self.module) else weight_of(self.module)  # which might compute it
        if type(weight) is nn.Parameter and self.stored is not weight:
            raise LayerError(
                f"layer {self.layer!r} ran with another weight in the place of its own (functional_call), and its "
                "curvature is taken in the weight; copy that into the module, or name a layer that is called once"
            )
        return self.module

    def untouched(self) -> bool:
        """Whether the output still holds what the layer returned."""
        return self.output._version == self.versions[1]

    def outputs_last(self) -> Float[Tensor, "... d"]:
        """The output with its rows in the last dimension, a view."""
        return self.kind.outputs_last(self.module, self.output)

    def rows(self, z: Tensor) -> Float[Tensor, "n t d"]:
        """A tensor like the output as (samples, positions, outputs)."""
        return as_rows(self.kind.outputs_last(self.module, z))

    def from_rows(self, rows: Float[Tensor, "..."]) -> Tensor:
        """Undo :meth:`rows`: shaped and typed as the output."""
        last = rows.reshape(self.outputs_last().shape)
        back = self.kind.outputs_back(self.module, last).reshape(self.output.shape)
        return back.to(self.output.dtype).contiguous()

    def input(self) -> Tensor:
        """The input, after checking that nothing overwrote it since."""
        if self.phi._version != self.versions[0]:
            raise GraphError(
                f"the input of layer {self.layer!r} was modified in place after the layer read it; "
                "use the out-of-place form of that operation"
            )
        return self.phi


def autocast_now(*, off: bool = False) -> dict[str, tuple[bool, torch.dtype]]:
    """Whether autocast is on, and its type, by kind of device; empty if nowhere; or as if it were ``off``."""
    if not (off or torch._C._is_any_autocast_enabled()):
        return {}
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {k: (torch.is_autocast_enabled(k) and not off, torch.get_autocast_dtype(k)) for k in kinds}


@dataclass(slots=True, eq=False, weakref_slot=True)
class Forward:
    """What one forward pass of the model left."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState | None = None
    calls: list[Call] = field(default_factory=list)
    parameters: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    mode: int = 0  # stands for which modules were in training mode
    outputs: Any = None
    autocast: dict[str, tuple[bool, torch.dtype]] = field(default_factory=autocast_now)
    step: int | None = None  # at which a loss was first computed from it
    passed_over: bool = False  # by one that began later and led to a loss
    recorded: bool = True  # whether the calls of layers were, as a penalty may follow

    def ends(self) -> list[Node]:
        """Where the graphs of the outputs end."""
        return [t.grad_fn for t in tree_leaves(self.outputs) if isinstance(t, Tensor) and t.grad_fn is not None]

    def leads_to(self, nodes: Collection[Node]) -> bool:
        """Whether some of a graph's nodes are of this pass; it is taken for granted where there are none to tell."""
        own = [c.edge.node for c in self.calls if c.edge is not None] + self.ends()
        return not own or any(node in nodes for node in own)


class Used(list[Forward]):
    """Passes that led to a loss, kept by that loss until its backward pass begins or it is gone."""

    def __call__(self, gradients: Any) -> None:
        """The hook on the loss: let go of the passes, so that its backward pass finds their memory free."""
        self.clear()


class Pending:
    """The recorded passes that a loss may still be computed from; its graph says from which it was.

    A pass that led to no loss yet is forgotten when another begins after a newer one led to one.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet  # whether no warning is given where many wait
        self.clear()

    def __len__(self) -> int:
        return len(self._fresh)

    def clear(self) -> None:
        """Forget all, and that there were any."""
        self._fresh: list[Forward] = []
        self._used: list[weakref.ref[Used]] = []
        self._overflow = self._any = False

    def begin(self) -> None:
        """Another pass begins: forget those that were passed over."""
        self._fresh = [r for r in self._fresh if not r.passed_over]

    def put(self, record: Forward) -> None:
        """Add a pass; when too many wait they are dropped, and the next criterion call says so."""
        if len(self._fresh) == _MOST:
            self._fresh, self._overflow = [], True
        self._fresh.append(record)
        if len(self._fresh) > _FEW:
            self._drop_when_freed(record)
        if len(self._fresh) == _MANY and not self.quiet:
            self.quiet = True
            warn(
                f"{_MANY} training forward passes wait for a criterion call, and their activations are kept for it; "
                "run those that are for something else under torch.no_grad(), or call the criterion's reset()"
            )

    def _drop_when_freed(self, record: Forward) -> None:
        """No loss can be computed from a pass any more once a backward pass has freed its graph."""
        me, one = weakref.ref(self), weakref.ref(record)

        def freed(gradients: Any) -> None:
            pending = me()
            if pending is not None and not torch._C._autograd._get_current_graph_task_keep_graph():
                pending._fresh = [r for r in pending._fresh if r is not one()]

        for node in record.ends():
            node.register_prehook(freed)

    def take(self, model: str, loss: Tensor | None) -> list[Forward]:
        """The passes that a loss was computed from, oldest first; without one all of them, which are forgotten.

        ``model`` is its class, for the error where there are none.
        """
        if loss is not None and not loss.requires_grad:
            raise no_graph()
        if self._overflow:
            self._overflow = False
            raise GraphError(
                f"more than {_MOST} training forward passes since the criterion was last called, so the older ones "
                "were dropped; call it once after each, run unused ones under torch.no_grad(), or call its reset() "
                "first"
            )
        if loss is None:
            records, self._fresh = self._fresh, []
            return records or self._none(model)
        records = [*dict.fromkeys(self._alive()), *self._fresh]
        if len(records) > 1:
            found = set(ancestors(loss.grad_fn))
            records = [r for r in records if r.leads_to(found)]
        return records or self._none(model)

    def _alive(self) -> Iterator[Forward]:
        """Passes that are still with the losses they led to."""
        self._used = [ref for ref in self._used if ref()]
        for ref in self._used:
            yield from ref() or ()

    def use(self, records: Sequence[Forward], loss: Tensor) -> None:
        """Leave passes to the loss they led to; further losses may be computed from them as long as it lasts."""
        newest = max((i for i, r in enumerate(self._fresh) if r in records), default=-1)
        for record in self._fresh[: newest + 1]:
            record.passed_over = True
        self._fresh = [r for r in self._fresh if r not in records]
        used, self._any = Used(records), True
        self._used.append(weakref.ref(used))
        if loss.grad_fn is not None:
            loss.grad_fn.register_prehook(used)

    def _none(self, model: str) -> NoReturn:
        if self._fresh or any(self._alive()):
            why = (
                "the loss was computed from none of those recorded (detached, or of another model), or the backward "
                "pass is over"
            )
        elif self._any:
            why = (
                "the backward pass of those it was called for is over; call it for all losses of a pass before that, "
                "or run the model again"
            )
        else:
            why = (
                f"call the model ({model}, as given to FAM, in training mode, with gradients enabled, and not one of "
                "its parts) first, and the criterion after it"
            )
        raise GraphError(f"no training forward pass to go with this criterion call: {why}")


def step_of(records: Sequence[Forward], now: int) -> int:
    """This step, or that in which an earlier loss was computed from the same passes."""
    steps = [r.step for r in records if r.step is not None]
    return max(steps) if len(steps) == len(records) else now


def no_graph() -> GraphError:
    """The error where a loss of a training model has no graph."""
    return GraphError(
        "the model is in training mode but the loss carries no graph (torch.no_grad() or detached outputs); "
        "call model.eval() to evaluate, or compute outputs and loss with gradients enabled"
    )


def same_values(call: Call, tensor: Float[Tensor, "..."], output: Float[Tensor, "..."]) -> bool:
    """Whether ``tensor`` is ``output``, reshaped, cast or copied but not computed upon.

    ``output`` is that of the call, or a view of it with its dimensions in another order. Not a comparison of numbers
    alone: either both share memory that nothing overwrote, or the graph between them consists of copies only.
    """
    if not call.untouched():
        return False
    if same_memory(tensor, output):
        return True
    if call.edge is None or tensor.grad_fn is None or tensor.numel() != call.output.numel():
        return False
    if follow(tensor.grad_fn, KEEPING + MOVING, until=call.edge.node) is not call.edge.node:
        return False
    flat = output.detach().reshape(-1)
    return torch.equal(tensor.detach().reshape(-1).to(flat.dtype), flat)


def depends_on(tensor: Tensor, calls: Sequence[Call]) -> list[Call]:
    """The calls whose outputs the tensor was computed from; one walk over its graph."""
    wanted = {c.edge.node for c in calls if c.edge is not None}
    found = wanted.intersection(ancestors(tensor.grad_fn))
    return [c for c in calls if c.edge is not None and c.edge.node in found]


def is_recurrent(calls: Sequence[Call]) -> bool:
    """Whether an input of the layer was computed from an earlier output of it."""
    return any(depends_on(later.phi, calls[:i]) for i, later in enumerate(calls) if i)
