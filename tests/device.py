"""The device that tests of numbers run on: the CPU, or what RELFLAT_TEST_DEVICE says, as ``make test-gpu`` does.

On another device, tensors that tests and layers make without naming one are made there; those that the library makes
are not, so that it meets what it meets when people use it. Random numbers of tests and layers are still those of the
CPU, moved: a test has the same networks and data everywhere, and may give a generator of the CPU. What the library
draws, it draws on the device.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

DEVICE = torch.device(os.environ.get("RELFLAT_TEST_DEVICE", "cpu"))
DRAWING = ("rand", "randn", "randint", "randperm", "normal", "from_numpy")  # the last knows no device
FILLING = ("uniform_", "normal_", "bernoulli_", "random_", "exponential_")


def use() -> None:
    """Let tests run on the device, from now on and in this process."""
    if DEVICE.type == "cpu":
        return
    torch.backends.cudnn.allow_tf32 = False  # float32 is held to its own digits
    names = {make.__name__ for make in _device_constructors()} | {*DRAWING}
    for name in names:
        if hasattr(torch, name):
            setattr(torch, name, made(getattr(torch, name), moved=name in DRAWING))
    for name in FILLING:
        setattr(torch.Tensor, name, filled(getattr(torch.Tensor, name)))


def of_the_library(frame: Any) -> bool:
    """Whether this is code of relflat, or of PyTorch but its layers, which decide themselves."""
    name = frame.f_globals.get("__name__", "")
    return name.startswith(("relflat", "torch.")) and not name.startswith("torch.nn.")


def made(make: Callable[..., torch.Tensor], *, moved: bool) -> Callable[..., torch.Tensor]:
    """The same on the device where none is named; ``moved`` from the CPU, where it is made."""

    @functools.wraps(make)
    def here(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = [*args, kwargs.get("out")]
        if (
            kwargs.get("device") is not None
            or any(isinstance(t, torch.Tensor) for t in given)
            or of_the_library(sys._getframe(1))
        ):
            return make(*args, **kwargs)
        if not moved:
            return make(*args, **kwargs | {"device": DEVICE})
        wanted = kwargs.pop("requires_grad", False)
        return make(*args, **kwargs).to(DEVICE).requires_grad_(wanted)

    return here


def filled(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, with what the CPU draws, unless the library or a generator of the device draws."""

    @functools.wraps(fill)
    def here(self: torch.Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
        given = kwargs if generator is None else kwargs | {"generator": generator}
        elsewhere = generator is not None and generator.device.type != "cpu"
        if self.device.type in ("cpu", "meta") or elsewhere or of_the_library(sys._getframe(1)):
            return fill(self, *args, **given)
        return self.copy_(fill(torch.empty_like(self, device="cpu"), *args, **given))

    return here
