"""What FSDP2 (``fully_shard``) does to the weights of a model, without importing it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def freed_after_forward(model: nn.Module, name: str) -> bool:
    """Whether the whole weight of a layer may be freed once the layer has run: a part around it is sharded.

    Args:
        model: the network.
        name: qualified name of the layer.
    """
    sharded = _class()
    if sharded is None:
        return False
    parts = name.split(".") if name else []
    around = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1))
    return any(isinstance(module, sharded) for module in around)


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Keep sharded weights whole over the differentiations of a block, for the backward pass that follows it.

    FSDP2 shards a weight again at the end of every backward pass, ``torch.autograd.grad`` included, and the graph
    of second derivatives still reads it. Leaves ``reshard_after_backward`` on, as ``fully_shard`` sets it.
    """
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_backward(True, recurse=False)


def reshard(model: nn.Module) -> None:
    """Shard again what :func:`kept_whole` left whole, where no backward pass follows."""
    for part in _parts(model):
        part.reshard()


def _parts(model: nn.Module) -> list[Any]:
    sharded = _class()
    return [] if sharded is None else [m for m in model.modules() if isinstance(m, sharded)]


def _class() -> type | None:
    """The class that ``fully_shard`` mixes in, if anything in this process can have used it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
