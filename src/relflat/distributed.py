"""Exact results from data that are spread over the processes of ``torch.distributed``."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from relflat.errors import DataError

T = TypeVar("T")


def gathered(make: Callable[[], T], group: Any) -> list[T]:
    """What ``make()`` gives on every rank of a process group, in the order of ranks; a list of one without a group.

    All ranks get the same list. An error on one of them ends all: it is raised there as it is, and reported here.

    Args:
        make: called once; its result must be picklable.
        group: a ``torch.distributed`` process group, or None.

    Raises:
        DataError: ``make()`` failed on another rank.
        RuntimeError: a rank died, or did not come within the timeout of the group (from ``torch.distributed``).
    """
    if group is None:
        return [make()]
    mine: T | None = None
    failure: Exception | None = None
    try:
        mine = make()
    except Exception as error:
        failure = error
    found: list[Any] = [None] * dist.get_world_size(group)
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    dist.all_gather_object(found, (said, mine), group=group)
    if failure is not None:
        raise failure
    for rank, (said, _) in enumerate(found):
        if said is not None:
            raise DataError(f"rank {rank} of {len(found)} could not measure its share of the data: {said}")
    return [value for _, value in found]


def several(group: Any) -> bool:
    """Whether there are other ranks in the group."""
    return group is not None and dist.get_world_size(group) > 1
