"""Hooks that keep the inputs and outputs of some layers during the model's own forward pass.

The tap never runs the model. It opens a record when the model's own forward begins, closes it when
that forward ends, and so ignores whatever else calls the layer: a recomputation by gradient
checkpointing, another model that shares it, a forward in evaluation mode.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize

from relflat.capture.calls import Call, Forward
from relflat.capture.hooks import WeakHook, nothing, remove
from relflat.capture.kinds import kind_of, own_weights, weight_of
from relflat.capture.outputs import output_layer
from relflat.capture.pending import Pending
from relflat.capture.resolve import Layer, Target, resolve, supported_layers
from relflat.distributed import freed_after_forward
from relflat.errors import ConfigError, GraphError, LayerError
from relflat.rng import RngState

Inject = Callable[[nn.Module, Tensor], Tensor]
"""What to give a tapped layer in place of its input: ``(layer, input) -> input``."""


class Tap:
    """Hooks on a model that record the calls of some layers during each training forward.

    Args:
        model: the module the user calls.
        layer: see :func:`relflat.capture.resolve.resolve`.
        when: whether a forward that begins now is recorded; by default while ``model.training``.

    Attributes:
        layers: the tapped layers, by qualified name.
        injector: if set, called at the start of each recorded forward; the change of the inputs of tapped layers.
        searching: whether the output layer is yet to be found by the first forward pass.
        keep_rng: whether each record keeps the state of the random number generators at its start.
        copied: whether this is a copy (deepcopy, pickle), which watches no model.

    The hooks hold no reference to the tap, so dropping the tap removes them. A deep copy or an unpickled
    copy of the model carries inert hooks.
    """

    searching = keep_rng = copied = False
    _depth = 0
    _open: Forward | None = None
    _watched: Forward | None = None
    injector: Callable[[], Inject | None] | None = None

    def __init__(self, model: nn.Module, layer: Layer, when: Callable[[], bool] | None = None) -> None:
        self.layers: dict[str, Target] = resolve(model, layer)
        named = [layer] if isinstance(layer, str | nn.Module | nn.Parameter) else list(layer)
        others = [n for n in named if not (isinstance(n, str) and n == "output")]
        self._asked_for = set(resolve(model, others)) if others else set()
        self.searching = (
            len(others) < len(named)
            and len(set(self.layers) - self._asked_for) > 1
            and "output" not in dict(model.named_modules())
        )
        self._model = weakref.ref(model)
        self._when = when
        self._called: set[str] = set()
        self._pending = Pending()
        self._replaying = False
        self._changed = False  # whether a layer's input or parameter was changed in a pass with a graph
        self._inject: Inject | None = None
        self._whole: dict[str, Tensor] = {}  # weights that are sharded again once their layer has run
        self._caches: list[Any] = []
        self._handles: dict[str, list[Any]] = {}
        self._attach(model)
        self._finalizer = weakref.finalize(self, remove, self._handles)

    # -- hooks ---------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module) -> None:
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        modules = {n: m for n, m in self.layers.items() if isinstance(m, nn.Module)}
        self._tied = {n for n, m in modules.items() if any(uses[id(w)] > 1 for w in own_weights(m))}
        for name, module in modules.items():
            before = module.register_forward_pre_hook(WeakHook(self, "_before_layer", name), with_kwargs=True)
            after = module.register_forward_hook(
                WeakHook(self, "_after_layer", name),
                with_kwargs=True,
                always_call=parametrize.is_parametrized(module),
            )
            self._handles[name] = [before, after]
        begin = model.register_forward_pre_hook(WeakHook(self, "_begin"), with_kwargs=True, prepend=True)
        end = model.register_forward_hook(WeakHook(self, "_end"), always_call=True)
        self._handles["<model>"] = [begin, end]

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._open = None
        if self._replaying or _recomputing() or torch._C._are_functorch_transforms_active():
            return  # a pass of our own or of checkpointing, or one inside torch.func: no criterion call follows
        if model.training if self._when is None else self._when():
            rng = RngState.now() if self.keep_rng else None
            mode = hash(tuple(m.training for m in model.modules()))
            self._open = Forward(args, kwargs, rng, grad=torch.is_grad_enabled(), mode=mode)
            self._inject = None if self.injector is None else self.injector()
            self._changed = False

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or self._open is None:
            return
        record, self._open = self._open, None
        if output is None:  # the forward raised: nothing of it is kept
            return
        record.outputs = output
        record.parameters = self._parameters()
        if self.searching:
            record.calls = self._keep(output_layer(record, self.layers), record.calls)
        self._pending.put(record)

    def _before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _recomputing():
            self._refuse_to_recompute(name)
            return None
        if self._open is not None:
            self._prepare(name, module)
        if self._inject is None or (self._open is None and not self._replaying):
            return None
        self._changed = self._changed or torch.is_grad_enabled()
        if args:
            return (self._inject(module, args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: self._inject(module, kwargs[first])}

    def _prepare(self, name: str, module: nn.Module) -> None:
        """Have the layer's weight read once, by itself and the record, and keep what FSDP2 frees after the layer."""
        if parametrize.is_parametrized(module):
            self._caches.append(parametrize.cached())  # power iteration, for one, counts evaluations
            self._caches[-1].__enter__()
        if freed_after_forward(self.model, name):
            kind = kind_of(module)
            assert kind is not None
            self._whole[name] = kind.matrix(module, weight_of(module)).clone()

    def _after_layer(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if _recomputing():
            return None if output is None else _with_graph(output)
        if self._open is None:
            return None
        try:
            phi = args[0] if args else next(iter(kwargs.values()))
            return None if output is None else self._record(name, module, phi, output)
        finally:
            if self._caches and parametrize.is_parametrized(module):
                self._caches.pop().__exit__(None, None, None)

    def _record(self, name: str, module: nn.Module, phi: Tensor, output: Tensor) -> Tensor | None:
        assert self._open is not None
        replaced = _with_graph(output)
        output = output if replaced is None else replaced
        edge = get_gradient_edge(output) if output.requires_grad else None
        kind = kind_of(module)
        assert kind is not None
        whole = self._whole.pop(name, None)
        weight = kind.matrix(module, weight_of(module)) if whole is None else whole
        versions = (phi._version, output._version) if not phi.is_inference() else (0, 0)
        tied = name in self._tied
        self._open.calls.append(Call(name, module, kind, phi, weight, output, edge, versions, tied))
        return replaced

    def _refuse_to_recompute(self, name: str) -> None:
        if self._changed:
            raise GraphError(
                f"gradient checkpointing recomputes layer {name!r} without the change that radius= or "
                "method='finite_difference' made to it; leave that layer out of the checkpointed part, or use "
                "another method"
            )

    def _keep(self, keep: str, calls: Sequence[Call]) -> list[Call]:
        """Remove the hooks of all layers but one and those asked for by name, and their calls."""
        wanted = {keep} | self._asked_for
        for name in [n for n in self.layers if n not in wanted]:
            for handle in self._handles.pop(name):
                handle.remove()
            del self.layers[name]
        self.searching = False
        return [c for c in calls if c.layer in wanted]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.layers.items() if isinstance(p, nn.Parameter)}

    # -- use -----------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The tapped model."""
        model = self._model()
        if model is None or not self._handles:
            raise GraphError("this tap is closed; build a new FAM for the model")
        return model

    @property
    def training(self) -> bool:
        """Whether the model is alive, tapped and in training mode.

        Raises:
            GraphError: if this is a copy, which watches no model.
        """
        if self.copied:
            raise GraphError(
                "this criterion is a copy (deepcopy or pickle), and its hooks stayed with the original model; "
                "build a new FAM for the copied model, or evaluate with criterion.eval()"
            )
        model = self._model()
        return model is not None and bool(self._handles) and model.training

    @property
    def pending(self) -> int:
        """How many forward passes wait for their criterion call."""
        return len(self._pending)

    def take(self) -> list[Forward]:
        """Hand over the records since the last call, oldest first, and forget them.

        Raises:
            GraphError: if there is none, or too many were left unused.
            LayerError: if a tapped layer was never called.
        """
        model = self.model
        if self._watched is not None:
            return [self._watched]
        records = self._pending.take(type(model).__name__)
        self._called |= {c.layer for r in records for c in r.calls}
        # a layer that rests in one step, such as an expert, has kappa 0 there
        unused = [n for n, m in self.layers.items() if isinstance(m, nn.Module) and n not in self._called]
        if unused:
            raise LayerError(
                f"layer {unused[0]!r} was not called in the forward pass; candidates: "
                f"{list(supported_layers(model))}. "
                f"If its weight is used all the same (as in attention), name the parameter: {unused[0] + '.weight'!r}"
            )
        return records

    def must_have_features(self, option: str) -> None:
        """Refuse tapped parameters.

        Raises:
            ConfigError: naming the option and the parameter.
        """
        for name in self._parameters():
            raise ConfigError(f"{option} needs features, and {name!r} is a parameter; name a layer")

    @contextmanager
    def replaying(self, inject: Inject | None) -> Iterator[None]:
        """Within the block the model may be run once more, unrecorded, with other inputs to the tapped layers."""
        self._inject, self._replaying = inject, True
        self._changed = self._changed or torch.is_grad_enabled()
        try:
            yield
        finally:
            self._inject, self._replaying = None, False

    def watch(self) -> None:
        """Record whatever calls the layers as one forward pass, whoever runs it, until :meth:`reset`.

        :meth:`take` then hands over all of it each time.
        """
        self.reset()
        self._depth, self._open = 1, Forward((), {}, parameters=self._parameters())
        self._watched = self._open

    @property
    def watching(self) -> bool:
        """Whether :meth:`watch` is in force."""
        return self._watched is not None

    def settle(self, calls: Sequence[Call], end: Call | None) -> list[Call]:
        """Find the output layer by what a loss was computed from: ``end`` if known, else the last call."""
        return self._keep((calls[-1] if end is None else end).layer, calls)

    def reset(self) -> None:
        """Forget the records kept so far, and stop watching."""
        self._pending.clear()
        self._whole = {}
        self._depth, self._open, self._watched = 0, None, None

    def close(self) -> None:
        """Remove the hooks and forget everything."""
        self.reset()
        remove(self._handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        """Return a closed tap: hooks belong to one model, and a copy of that is another."""
        return _closed_tap()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_closed_tap, ())


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, as the recomputation of gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def _with_graph(output: Tensor) -> Tensor | None:
    """In place of a frozen layer's output on constant input: one with a graph, so that the tail has one."""
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    return output.detach().requires_grad_().clone()


def _closed_tap() -> Tap:
    tap = object.__new__(Tap)
    tap.layers, tap._handles, tap._model, tap._pending = {}, {}, nothing, Pending()  # type: ignore[assignment]
    tap.copied = True
    tap.reset()
    return tap
