"""Several processes: results gathered over ``torch.distributed``, and weights that FSDP2 shards."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from relflat.errors import DataError

T = TypeVar("T")


def gathered(make: Callable[[], T], group: Any) -> list[T]:
    """What ``make()`` gives on every rank of a process group, in the order of ranks; a list of one without a group.

    An error on one rank ends all: it is raised there as it is, and reported by the others. Where a rank died, or does
    not come within the timeout of the group, ``torch.distributed`` raises.
    """
    if group is None:
        return [make()]
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        mine = make()
    except Exception as error:  # whatever it was: the others wait for an answer
        dist.all_gather_object(found, (f"{type(error).__name__}: {error}", None), group=group)
        raise
    dist.all_gather_object(found, (None, mine), group=group)
    for rank, (said, _) in enumerate(found):
        if said is not None:
            raise DataError(f"rank {rank} of {len(found)} could not measure its share of the data: {said}")
    return [value for _, value in found]


def freed_after_forward(model: nn.Module, name: str) -> bool:
    """Whether the whole weight of a layer may be freed once the layer has run: a part around it is sharded."""
    sharded = _class() if _initialised() else None
    if sharded is None:
        return False
    parts = name.split(".") if name else []
    around = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1))
    return any(isinstance(module, sharded) for module in around)


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Keep sharded weights whole over the differentiations of a block, for the backward pass that follows it.

    DDP does not take them for that, see :func:`not_taken_for_backward`.

    FSDP2 shards a weight again at the end of every backward pass, ``torch.autograd.grad`` included, and the graph
    of second derivatives still reads it. Leaves ``reshard_after_backward`` on, as ``fully_shard`` sets it.
    """
    parts = _parts(model) if _initialised() else []
    for part in parts:
        part.set_reshard_after_backward(False, recurse=False)
    try:
        with not_taken_for_backward():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_backward(True, recurse=False)


def reshard(model: nn.Module) -> None:
    """Shard again what :func:`kept_whole` left whole, where no backward pass follows."""
    for part in _parts(model):
        part.reshard()


@contextmanager
def not_taken_for_backward() -> Iterator[None]:
    """Within the block DDP does not take a differentiation for the backward pass.

    With ``static_graph=True`` it reduces all gradients at the end of the first backward pass through the outputs,
    ``torch.autograd.grad`` included, which has none to reduce; those of the real one would be left as they are.
    """
    sink: Any = getattr(sys.modules.get("torch.nn.parallel.distributed"), "_DDPSink", None)
    if sink is None or not _initialised():
        yield
        return
    backward = sink.backward
    sink.backward = staticmethod(lambda ctx, *gradients: (None, *gradients))
    try:
        yield
    finally:
        sink.backward = staticmethod(backward)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _parts(model: nn.Module) -> list[Any]:
    sharded = _class()
    return [] if sharded is None else [m for m in model.modules() if isinstance(m, sharded)]


def _class() -> type | None:
    """The class that ``fully_shard`` (FSDP2) mixes in, if anything in this process can have used it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
