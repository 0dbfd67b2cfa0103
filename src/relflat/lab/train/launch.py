"""Runs started by ``torchrun``: several processes for one command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process, 0 where there is but one."""
    return int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group() -> Iterator[Any]:
    """The group of the processes that ``torchrun`` started; None where there is but one.

    Joins them if nobody did so before, and leaves them at the end of the block.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    join = not dist.is_initialized()
    if join:
        if device().type == "cuda":
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        if join:
            dist.destroy_process_group()
