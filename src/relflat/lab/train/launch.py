"""Runs started by ``torchrun``: several processes for one command."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """The number and the device of this process, its own GPU or the CPU; it joins those that ``torchrun`` started."""
    return PartialState(cpu=not torch.cuda.is_available())


@contextmanager
def joined() -> Iterator[PartialState]:
    """This process among those that ``torchrun`` started, which part at the end of the block."""
    others = torch.distributed.is_initialized()
    state = this_process()
    try:
        yield state
    finally:
        if not others:
            state.destroy_process_group()
