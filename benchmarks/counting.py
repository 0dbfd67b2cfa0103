"""What a step costs in things that can be counted: passes, floating point operations, bytes alive.

Unlike times, these do not depend on the machine's mood, so tests can hold the library to them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_FREE = {
    *("view", "_unsafe_view", "expand", "permute", "transpose", "t", "detach", "alias", "as_strided", "select"),
    *("slice", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty"),
    *("lift_fresh", "empty_strided", "new_empty_strided", "promote_types"),
    *("_record_function_enter_new", "_record_function_exit"),
}
"""Operations of the dispatcher that compute nothing."""

Step = Callable[[], Any]


class HasStep(Protocol):
    """Anything that takes steps."""

    def step(self) -> Any:
        """Take one."""


@dataclass
class Passes:
    """How often a step went through two modules: calls, and gradients that arrived at their outputs.

    Attributes:
        trunk_forward: calls of the first module that has parameters of its own.
        trunk_backward: gradients that arrived at its output.
        tail_forward: calls of the last such module.
        tail_backward: gradients that arrived at its output.
    """

    trunk_forward: int = 0
    trunk_backward: int = 0
    tail_forward: int = 0
    tail_backward: int = 0


def passes(model: nn.Module, step: Step) -> Passes:
    """Count forward and backward passes of one step by hooks on the first and the last module of a model.

    A penalty that asks for a gradient of its own shows as a second arrival where that gradient begins or goes
    through; one that only adds to the loss does not.
    """
    own = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    count = Passes()
    handles = [_count(m, count, name) for m, name in ((own[0], "trunk"), (own[-1], "tail"))]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return count


def _count(module: nn.Module, count: Passes, name: str) -> Any:
    def bump(what: str) -> None:
        setattr(count, f"{name}_{what}", getattr(count, f"{name}_{what}") + 1)

    def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
        bump("forward")
        if output.requires_grad:
            output.register_hook(lambda _gradient: bump("backward"))

    return module.register_forward_hook(after)


class Operations(TorchDispatchMode):
    """Counts the operations within the block that compute something: a GPU launches a kernel for each, or more."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and do it."""
        self.counts[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All but views and allocations."""
        return sum(count for name, count in self.counts.items() if name not in _FREE)


class _Operations(TorchDispatchMode):
    """Counts what reaches a device: every operation but views, which compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        views = isinstance(function, torch._ops.OpOverload) and function.is_view
        self.count += not (views or "profiler" in str(function))
        return found


def operations(step: Step) -> int:
    """Operations of one step: kernel launches on a GPU, each with a price of its own however small it is."""
    with _Operations() as counter:
        step()
    return counter.count


def flops(step: Step) -> int:
    """Floating point operations of the matrix products, convolutions and attention of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(build: Callable[[], HasStep], *, warm_up: int = 2) -> int:
    """Most bytes of tensors alive at one time within one step, weights and optimiser state included.

    The profiler reports every allocation and release of torch's CPU allocator, temporaries inside an operation
    too. Only what is allocated under its eyes can be seen to be released, so it watches from before the model
    is built; the peak is that of the step after ``warm_up`` steps, when gradients and momentum exist. Workspaces
    that oneDNN allocates for itself are not seen; they are the same for all methods and not tensors.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        trainer = build()
        for _ in range(warm_up):
            trainer.step()
        with record_function("the step that counts"):
            trainer.step()
    events = watch.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "the step that counts")
    live = peak = 0
    for when, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        peak = peak if when >= begin else 0
        live += change
        peak = max(peak, live)
    return peak
