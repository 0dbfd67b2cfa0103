"""Data as batches, and a model that is only looked at."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from relflat.capture.outputs import output_tensor
from relflat.errors import DataError, LossError
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
    """The data as batches on a device."""

    def __init__(self, data: Any, forward: ForwardFn | None, device: torch.device | None) -> None:
        single = isinstance(data, tuple | Mapping)
        self.data: Iterable[Batch] = [data] if single else data
        self.forward, self.device = forward or default_forward, device
        if not isinstance(self.data, Iterable):
            raise DataError(
                f"data must be batches or one (inputs, targets) tuple, not {type(data).__name__} (wrap a Dataset in "
                "a DataLoader)"
            )

    def must_be_repeatable(self, why: str) -> None:
        """Refuse one-shot iterators."""
        if isinstance(self.data, Iterator):
            raise DataError(f"{why} goes over the data more than once, and it is an iterator; give a list or loader")

    def __iter__(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield every batch, the first together with the second, if there is one."""
        source = iter(self.data)
        window = list(itertools.islice(source, 2))
        for i, batch in enumerate(itertools.chain(window, source)):
            yield self._move(batch), self._move(window[1]) if i == 0 and len(window) == 2 else None

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


def samples_in(batch: Batch) -> int:
    """Number of samples of a batch: the length of its first tensor of two dimensions, else of its last."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    if not tensors:
        raise DataError(f"the batch ({type(batch).__name__}) holds no tensor, so its samples cannot be counted")
    batched = next((t for t in tensors if t.ndim > 1), tensors[-1])
    return batched.shape[0] if batched.ndim else 1


def join(one: Any, two: Any) -> Any:
    """Two batches' outputs or targets as one, tensor by tensor."""
    return tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a, one, two)
