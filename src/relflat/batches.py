"""Data as batches, and a model that is only looked at."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from relflat.errors import DataError, LossError
from relflat.layers import rows
from relflat.penalty import output_tensor
from relflat.record import Forward
from relflat.rng import rng_preserved

Batch = Any
ForwardFn = Callable[[nn.Module, Batch], tuple[Any, Any]]


def default_forward(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Run the model on ``(inputs, targets)`` or on a mapping with ``labels``; returns outputs and targets."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"the batch is a mapping without 'labels' (keys {list(batch)}); pass forward=")
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
        return getattr(outputs, "logits", outputs), batch["labels"]
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise DataError(
            f"a batch must be (inputs, targets) or a mapping with 'labels', not {type(batch).__name__}"
            f"{f' of length {len(batch)}' if isinstance(batch, list | tuple) else ''}; pass forward="
        )
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return model(**inputs), targets
    return (model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)), targets


class Batches:
    """The data as batches on a device; knows of each whether it is the only one."""

    def __init__(self, data: Any, forward: ForwardFn, device: torch.device | None) -> None:
        single = isinstance(data, tuple | Mapping)
        self.data: Iterable[Batch] = [data] if single else data
        self.forward, self.device = forward, device
        if not isinstance(self.data, Iterable):
            raise DataError(f"data must be batches or one (inputs, targets) tuple, not {type(data).__name__}")

    def must_be_repeatable(self, why: str) -> None:
        """Refuse one-shot iterators."""
        if isinstance(self.data, Iterator):
            raise DataError(
                f"{why} goes over the data more than once, and it is an iterator; give a list or loader"
            )

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        ahead = iter(self.data)
        for i in itertools.count():
            window = list(itertools.islice(ahead, 2 if i == 0 else 1))
            if i == 0:
                for batch in window:
                    yield self._move(batch), len(window) == 1
            elif window:
                yield self._move(window[0]), False
            if not window:
                return

    def _move(self, batch: Batch) -> Batch:
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) and self.device else x, batch)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode; restore modes and global random numbers after it."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with rng_preserved(), torch.enable_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's parameters are; None if it has none."""
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def length(outputs: Any) -> int:
    """Number of samples in a batch's outputs."""
    tensor = output_tensor(outputs)
    if tensor is None or tensor.ndim == 0:
        raise LossError("the outputs hold no tensor with a batch dimension, so batches cannot be weighted")
    return tensor.shape[0]


def samples_in(tensor: Tensor | None, record: Forward) -> int:
    """Number of samples of a batch, from its outputs or else from the tapped features."""
    if tensor is not None and tensor.ndim:
        return tensor.shape[0] if tensor.ndim > 1 or record.calls[0].phi.ndim > 1 else 1
    return rows(record.calls[0].module, record.calls[0].phi).shape[0]


def take(tree: Any, piece: slice, n: int) -> Any:
    """The samples ``piece`` of every tensor that has ``n`` of them."""
    return tree_map(lambda t: t[piece] if isinstance(t, Tensor) and t.ndim and t.shape[0] == n else t, tree)


class Switch:
    """Says whether forwards are recorded."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *exc: object) -> None:
        self.on = False
