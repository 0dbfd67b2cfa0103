"""Hooks that keep the inputs and outputs of some layers during the model's own forward pass.

The tap never runs the model. It ignores whatever else calls the layer: a recomputation, another model that shares it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from relflat.capture.calls import Call, Forward, Pending, depends_on
from relflat.capture.hooks import WeakHook, endpoint, recomputing, remove, runs, saved_by_us, traced, with_graph
from relflat.capture.kinds import Kind, is_linear, kind_of, own_weights, parametrization_of, weight_of
from relflat.capture.resolve import Layer, Target, is_pattern, mode_of, part, resolve, supported_layers
from relflat.capture.settle import output_layer, taking_part
from relflat.capture.uses import Uses
from relflat.distributed import freed_after_forward
from relflat.errors import ConfigError, GraphError, LayerError
from relflat.rng import rng_now

_LEAVING = "<leaving>"
Inject = Callable[[nn.Module, Tensor], Tensor]
"""What to give a tapped layer in place of its input: ``(layer, input) -> input``."""


class Tap:
    """Hooks on a model that record the calls of some layers during each forward; they do not hold the tap."""

    needs_features = False  # whether layers that globs stand for must have been called with features
    searching = False  # whether the output layer is yet to be found by the first forward pass
    keep_rng = False  # whether each record keeps the state of the random number generators at its start
    copied = False  # whether this is a copy (deepcopy, pickle), which watches no model
    injector: Callable[[], Inject | None] | None = None  # called as each record starts: how inputs change
    rests: Callable[[], bool] | None = None  # asked as a pass begins: whether its layers need not be recorded
    _depth = _compared = 0
    _open: Forward | None = None
    _watched: Forward | None = None
    _replaying = _changed = False  # changed: a layer's input or parameter, in a pass with a graph
    _inject: Inject | None = None

    def __init__(self, model: nn.Module, layer: Layer, *, measuring: bool = False) -> None:
        self.layers: dict[str, Target] = resolve(model, layer)
        named = [layer] if isinstance(layer, str | nn.Module | nn.Parameter) else list(layer)
        self._asked_for, self._matched = (
            set(resolve(model, some)) if (some := [n for n in named if is_pattern(model, n) is kind]) else set()
            for kind in (None, "glob")
        )
        self.searching = any(isinstance(n, str) and n == "output" for n in named)
        self._matched -= self._asked_for
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._measuring = measuring  # every pass counts, in any mode
        self._parameters: dict[str, Target] = {n: p for n, p in self.layers.items() if isinstance(p, nn.Parameter)}
        self._called: set[str] = set()
        self._bent: set[str] = set()  # layers that were seen to give something else than their class says
        self._given: set[str] = set()  # layers whose output was given a graph
        self._pending = Pending(quiet=measuring)
        self._whole: dict[str, Tensor] = {}  # weights that are sharded again once their layer has run
        self._computed: dict[tuple[str, int], Tensor] = {}  # weights by layer and thread, as it computed them
        self._seen: dict[str, weakref.ref[nn.Module]] = {}  # what computes them, with a hook
        self._handles: dict[str, list[Any]] = {}
        self._attach(model)
        weakref.finalize(self, remove, self._handles)

    def _attach(self, model: nn.Module) -> None:
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        modules = {n: m for n, m in self.layers.items() if isinstance(m, nn.Module)}
        self._tied = {n for n, m in modules.items() if any(uses[id(w)] > 1 for w in own_weights(m))}
        self._kinds: dict[str, Kind] = {}
        for name, module in modules.items():
            self._hook(name, module)
        begin = model.register_forward_pre_hook(WeakHook(self, "_begin"), with_kwargs=True, prepend=True)
        end = model.register_forward_hook(WeakHook(self, "_end"), always_call=True)
        self._handles["<model>"] = [begin, end]

    def _hook(self, name: str, module: nn.Module) -> None:
        """Watch a layer; its output is seen before other hooks change it."""
        self._kinds[name] = cast(Kind, kind_of(module))
        before, after = WeakHook(self, "_before_layer", name), WeakHook(self, "_after_layer", name)
        self._handles[name] = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True, prepend=True),
        ]

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth and self._watched is None and not runs(model):
            self._depth = 0  # an interrupt (Ctrl-C) ended the last pass, and hooks do not run after that
        self._depth += 1
        if self._depth > 1:
            return
        self._open = None
        remove({_LEAVING: self._handles.pop(_LEAVING, [])})
        if self._wants(model):
            self._pending.begin()
            self._changed, self._inject = False, None
            if self._may_rest():
                self._open = Forward((), {}, recorded=False)
                return
            self._follow(model)
            rng = rng_now() if self.keep_rng else None
            self._open = Forward(args, kwargs, rng, mode=mode_of(model))
            self._inject = None if self.injector is None else self.injector()

    def _may_rest(self) -> bool:
        return bool(self._called) and not self.unsettled and self.rests is not None and self.rests()

    def _wants(self, model: nn.Module) -> bool:
        """Whether a criterion call may follow a pass: not one of our own, recomputed, in torch.func, or traced."""
        if self._replaying or recomputing() or traced() or torch._C._are_functorch_transforms_active():
            return False
        return self._measuring or (model.training and torch.is_grad_enabled())

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or self._open is None:
            return
        record, self._open = self._open, None
        if output is None:  # the forward raised: nothing of it is kept
            return
        record.outputs, record.parameters = output, self._parameters
        self._pending.put(record)

    def _before_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if recomputing():
            if self._changed:
                raise GraphError(
                    f"gradient checkpointing recomputes layer {name!r} without the change that radius= or "
                    "method='finite_difference' made to it; leave that layer out of the checkpointed part, or use "
                    "another method"
                )
            return None
        if self._open is not None and self._open.recorded:
            self._prepare(name, module)
        if self._inject is None or (self._open is None and not self._replaying):
            return None
        self._changed = self._changed or torch.is_grad_enabled()
        if args:
            return (self._inject(module, args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: self._inject(module, kwargs[first])}

    def _prepare(self, name: str, module: nn.Module) -> None:
        """Have a weight that is computed be seen as the layer gets it; keep one that FSDP2 frees after the layer."""
        computed = parametrization_of(module)
        if computed is not None:
            self._computed.pop((name, get_ident()), None)
            if name not in self._seen or self._seen[name]() is not computed:
                self._seen[name] = weakref.ref(computed)
                hook = computed.register_forward_hook(WeakHook(self, "_after_parametrization", name))
                self._handles[name].append(hook)
        elif freed_after_forward(self.model, name):
            self._whole[name] = self._kinds[name].matrix(module, weight_of(module)).clone()

    def _after_parametrization(self, name: str, computed: nn.Module, args: Any, weight: Tensor) -> None:
        if self._open is not None:
            self._computed[name, get_ident()] = weight

    def _after_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if recomputing():
            return with_graph(output) if isinstance(output, Tensor) else None
        phi: Any = next(iter((*args, *kwargs.values())), None)
        tensors = isinstance(phi, Tensor) and isinstance(output, Tensor)  # not a packed sequence, or several
        if self._open is None or name not in self.layers or not tensors:
            return None
        replaced = with_graph(output)
        if not self._open.recorded:
            return replaced
        if replaced is not None:
            self._given.add(name)
        self._open.calls.append(self._call(name, module, phi, output if replaced is None else replaced))
        return replaced

    def _call(self, name: str, module: nn.Module, phi: Tensor, output: Tensor) -> Call:
        edge, versions = endpoint(phi, output)
        kind, weight = self._kinds[name], self._whole.pop(name, None)
        stored = w if (w := self._computed.pop((name, get_ident()), None)) is not None else weight_of(module)
        if weight is None:
            with saved_by_us():
                weight = kind.matrix(module, stored)
        self._compared += 1  # all samples at first, and in measuring
        turn = self._compared if name in self._called and not self._measuring else None
        linear = name not in self._bent and (
            kind.trusted(module) or is_linear(kind, module, phi, weight, output, turn)
        )
        self._bent.update([] if linear else [name])
        how = name in self._tied, phi.grad_fn, stored, linear
        return Call(name, module, kind, phi, weight, output, edge, versions, *how)

    def _follow(self, model: nn.Module) -> None:
        """Watch the layer that has a name now, where another one was put in its place."""
        for name, old in list(self.layers.items()):
            now = part(model, name, old)
            if now is old:
                continue
            if now is None or (isinstance(old, nn.Module) and not (isinstance(now, nn.Module) and kind_of(now))):
                what = "is gone from the model" if now is None else f"was replaced by a {type(now).__name__}"
                raise LayerError(f"layer {name!r} {what} since it was named; build a new criterion for the model")
            self.layers[name] = now
            if name in self._parameters:
                self._parameters[name] = now
            if name in self._handles and isinstance(now, nn.Module):
                remove({name: self._handles.pop(name)})
                self._seen.pop(name, None)
                self._hook(name, now)

    def _keep(self, wanted: dict[str, Target], forwards: Sequence[Forward]) -> None:
        """Watch those layers from now on and no others, and forget the calls of others."""
        called = {c.layer for f in forwards for c in f.calls}.intersection(wanted)
        for name in self._handles.keys() - called - {"<model>", _LEAVING}:
            if name in self._given:  # a recomputation in the backward pass must give the same graph once more
                self._handles.setdefault(_LEAVING, []).extend(self._handles.pop(name))
            else:
                remove({name: self._handles.pop(name)})
        self.layers = {n: t for n, t in (self.layers | wanted).items() if n in wanted}
        self._parameters.clear()
        self._parameters.update({n: t for n, t in self.layers.items() if n not in called})
        for record in forwards:
            record.calls = [c for c in record.calls if c.layer in called]

    @property
    def model(self) -> nn.Module:
        """The tapped model."""
        model = self._model()
        if model is None or not self._handles:
            raise GraphError("this tap is closed; build a new FAM for the model")
        return model

    @property
    def training(self) -> bool:
        """Whether the model is alive, tapped and in training mode; refused for a copy, which watches no model."""
        if self.copied:
            raise GraphError(
                "this criterion is a copy (deepcopy or pickle), and its hooks stayed with the original model; "
                "build a new FAM for the copied model, or evaluate with criterion.eval()"
            )
        return self.tapped and self.model.training

    @property
    def tapped(self) -> bool:
        """Whether the model is alive, and watched by hooks."""
        return self._model() is not None and bool(self._handles)

    @property
    def pending(self) -> int:
        """How many forward passes wait for their criterion call."""
        return len(self._pending)

    def take(self, loss: Tensor | None = None) -> list[Forward]:
        """The records that a loss was computed from, oldest first; without one all, which are forgotten."""
        model = self.model
        if self._watched is not None:
            return [self._watched]
        records = self._pending.take(type(model).__name__, loss)
        self._called.update(c.layer for r in records for c in r.calls)
        # a layer that rests in one step, such as an expert, has kappa 0 there
        unused = [n for n in sorted(self._asked_for - self._called) if n in self._handles]
        if unused:
            raise LayerError(
                f"layer {unused[0]!r} was not called in the forward pass, with one tensor for one; candidates: "
                f"{[n for n in supported_layers(model) if n not in unused]}. If it rests at times, let it run in the "
                f"first. If its weight is used all the same (as in attention), name that: {unused[0] + '.weight'!r}"
            )
        return records

    def expect_none(self) -> None:
        """Let :meth:`take` pass layers that were not called."""
        self._called.update(self.layers)

    def leave(self, records: Sequence[Forward], loss: Tensor, step: int) -> None:
        """Leave records to a loss computed from them at a step; they can be taken until its backward pass."""
        if self._watched is None:
            for record in records:
                record.step = step
            self._pending.use(records, loss)

    def must_have_features(self, option: str) -> None:
        """Refuse tapped parameters."""
        for name in self._parameters.keys() - self._matched:
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
        """Until :meth:`reset`, record whatever calls the layers as one pass, which :meth:`take` gives each time."""
        self.reset()
        self._depth, self._open = 1, Forward((), {}, parameters=self._parameters)
        self._watched = self._open

    @property
    def watching(self) -> bool:
        """Whether :meth:`watch` is in force."""
        return self._watched is not None

    @property
    def unsettled(self) -> bool:
        """Whether it is yet to be found what ``"output"`` or a glob stands for."""
        return self.searching or bool(self._matched)

    def settle(
        self, forwards: Sequence[Forward], loss: Tensor, source: Tensor | None, end: Call | None = None
    ) -> None:
        """Find once what ``"output"`` and globs stand for, and forget the rest.

        By the passes behind a loss, what it was computed from, and the call whose output that was, if known.
        """
        calls = [c for f in forwards for c in f.calls]
        wanted = {n: t for n, t in self.layers.items() if n in self._asked_for}
        if self.searching:
            names = {id(p): n for n, p in self.model.named_parameters()}
            output = output_layer(loss, source, calls, names) if end is None else end.layer
            wanted[output] = self.layers[output] if output in self.layers else self.model.get_parameter(output)
        if self._matched:
            given = {n: t for n, t in self.layers.items() if n in self._matched}
            wanted |= taking_part(given, depends_on(loss, calls), Uses(loss), features=self.needs_features)
        self.searching, self._matched = False, set()
        self._keep(wanted, forwards)

    def reset(self) -> None:
        """Forget the records kept so far, and stop watching."""
        self._pending.clear()
        self._whole, self._computed = {}, {}
        self._depth, self._open, self._watched = 0, None, None

    def close(self) -> None:
        """Remove the hooks and forget everything."""
        self.reset()
        remove(self._handles)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a closed tap: hooks belong to one model, and a copy of that is another."""
        return _closed_tap, ()


def _closed_tap() -> Tap:
    tap = object.__new__(Tap)
    tap.layers, tap._parameters, tap._handles, tap._pending, tap.copied = {}, {}, {}, Pending(), True
    tap._matched, tap._model = set(), lambda: None
    return tap
