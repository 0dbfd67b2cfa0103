"""What FSDP2 (``fully_shard``) does to the weight of a layer, without importing it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def freed_after_forward(model: nn.Module, name: str) -> bool:
    """Whether the whole weight of a layer may be freed once the layer has run: a part of the model is sharded.

    Args:
        model: the network.
        name: qualified name of the layer.
    """
    fully_sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fully_sharded is None:
        return False
    parts = name.split(".") if name else []
    around = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1))
    return any(isinstance(module, fully_sharded) for module in around)


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Keep sharded weights whole over the differentiations of a block, for the backward pass that follows it.

    FSDP2 shards a weight again at the end of every backward pass, ``torch.autograd.grad`` included, and the graph
    of second derivatives still reads it. Leaves ``reshard_after_backward`` on, as ``fully_shard`` sets it.
    """
    sharded = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
    for module in sharded:
        module.set_reshard_after_backward(False, recurse=False)  # type: ignore[operator]
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_backward(True, recurse=False)  # type: ignore[operator]


def reshard(model: nn.Module) -> None:
    """Shard again what :func:`kept_whole` left whole, where no backward pass follows."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):
            module.reshard()  # type: ignore[operator]
