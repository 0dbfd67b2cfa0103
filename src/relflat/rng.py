"""Random numbers: generators of our own, and the state of everybody else's."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class Rng:
    """Random numbers of one step: a function of ``(seed, step, rank)`` alone, so that a resumed run draws the same.

    Ranks of ``torch.distributed`` draw differently, as each sees samples of its own; rank 0 draws what a single
    process does, and so do all if the numbers are ``shared``.
    """

    def __init__(self, seed: int, step: int, *, shared: bool = False) -> None:
        self._name = seed, step, shared
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator on a device, at its present state."""
        if device not in self._generators:
            seed, step, shared = self._name
            number = hashed(f"{seed},{step},{0 if shared else _rank()}")
            self._generators[device] = torch.Generator(device=device).manual_seed(number)
        return self._generators[device]

    def signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Independent signs, -1 or +1 (Rademacher), with the dtype and device of ``like``."""
        generator = self.on(like.device)
        bits = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=like.dtype)
        return bits.mul_(2).sub_(1)

    def normal(self, like: Tensor) -> Tensor:
        """Independent standard normal numbers with the shape, dtype and device of ``like``."""
        return torch.randn(like.shape, generator=self.on(like.device), device=like.device, dtype=like.dtype)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def subset(seed: int, step: int, count: int, size: int) -> list[int]:
    """``size`` of the numbers below ``count``, uniform without replacement, in order; the same on all ranks."""
    generator = torch.Generator().manual_seed(hashed(f"{seed},{step},subset"))
    return sorted(torch.randperm(count, generator=generator, device="cpu")[:size].tolist())


def hashed(name: str) -> int:
    """A seed; hashed, since generators on the CPU look at the lower 32 bits only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


RngState = tuple[Tensor, list[Tensor]]
"""The state of PyTorch's global generators: CPU and every CUDA device in use."""


def rng_now() -> RngState:
    """Read the present state."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda


@contextmanager
def rng_preserved(start: RngState | None = None) -> Iterator[None]:
    """Run a block, from ``start`` if given, and leave the global generators as they were found."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices, device_type="cuda"):
        if start is not None:
            torch.set_rng_state(start[0])
            torch.cuda.set_rng_state_all(start[1])
        yield
