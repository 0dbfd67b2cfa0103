"""Hooks on modules that neither keep their owner alive nor outlive it."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import GradientEdge, get_gradient_edge

from relflat.distributed import kept_whole


class WeakHook:
    """A hook that knows its owner weakly, and is inert in copies of the module it sits on."""

    def __init__(self, owner: Any, method: str, *args: Any) -> None:
        self._owner = weakref.ref(owner) if owner is not None else lambda: None
        self._method, self._args = method, args

    def __call__(self, *args: Any) -> Any:
        """Call the owner's method, if it is alive; a graph that is exported has nothing of it."""
        owner = None if torch.compiler._is_exporting_flag else self._owner()
        if owner is None:
            return None
        if torch.compiler.is_dynamo_compiling():
            return call_close_of_the_FAM_for_a_model_in_one_graph(getattr(owner, self._method), *self._args, *args)
        return getattr(owner, self._method)(*self._args, *args)

    @property
    def __name__(self) -> str:
        """None, as what asks for it (``torch.jit.script``) would compile the hook."""
        raise AttributeError(
            "a FAM watches this model, and its hooks cannot be compiled by torch.jit.script: call its close() first "
            "(before the model is copied, if this is a copy)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, (None, self._method, *self._args)


def remove(handles: dict[str, list[Any]]) -> None:
    """Remove hooks by their handles, and forget those."""
    while handles:
        for handle in handles.popitem()[1]:
            handle.remove()


@_disable_dynamo  # torch.compiler.disable would load the compiler with this module
def call_close_of_the_FAM_for_a_model_in_one_graph(method: Callable[..., Any], *args: Any) -> Any:
    """Run a hook outside of compiled graphs; its name is what ``fullgraph=True`` says where it cannot."""
    return method(*args)


def traced() -> bool:
    """Whether a call of a module is written down as a program, with no numbers in it."""
    by_fx = getattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", False)
    return by_fx or torch._C._get_tracing_state() is not None


def recomputing() -> bool:
    """Whether this runs inside a backward pass, as the recomputation of gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the block derivatives leave weights whole, and checkpointing buffers, such as running averages, alone.

    They are written past the version counters, as normalisations do: graphs have them saved.
    """
    found: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, args: Any) -> None:
        if module.training and recomputing():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    found.setdefault((module, name), (buffer, buffer.detach().clone()))
            restore(module)

    def restore(only: nn.Module | None = None) -> None:
        for (module, name), (buffer, before) in found.items():
            if only is None or module is only:
                buffer.data.copy_(before)
                module._buffers[name] = buffer

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with kept_whole(model):
            yield
    finally:
        handle.remove()
        restore()


def runs(model: nn.Module) -> bool:
    """Whether a call of the model is under way, other than the one whose hooks run: it called itself."""
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and count < 2:
        count += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is model
        frame = frame.f_back
    return count > 1


def saved_by_us() -> AbstractContextManager[None]:
    """Within the block autograd saves tensors past hooks in force: checkpointing counts those that it will repeat."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return _NOTHING
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def with_graph(output: Tensor) -> Tensor | None:
    """In place of a frozen layer's output on constant input: one with a graph, so that the tail has one."""
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    return output.detach().requires_grad_().clone()


def endpoint(phi: Tensor, output: Tensor) -> tuple[GradientEdge | None, tuple[int, int]]:
    """Where the graph passes an output, None if it has no graph; and how often input and output were written to.

    An output that is a view of all that was computed is passed there: writing to it gives the view another history.
    """
    versions = 0 if phi.is_inference() else phi._version, 0 if output.is_inference() else output._version
    base = output._base
    if base is not None and base.requires_grad and base.numel() == output.numel() and base.is_contiguous():
        output = base if output.is_contiguous() else output
    return (get_gradient_edge(output) if output.requires_grad else None), versions


_NOTHING = nullcontext()
