"""Data as batches, and how their losses make up that of all the data: as a mean, by a divisor, or as a sum."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from relflat.errors import DataError, LossError
from relflat.estimate.scene import Scene

Batch = Any
ForwardFn = Callable[[nn.Module, Batch], tuple[Any, Any]]
Weight = tuple[float, float]
"""What a batch's loss is multiplied by to be added up, and what it adds to the divisor (0: there is none)."""


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

    def __init__(self, data: Any, forward: ForwardFn | None, device: torch.device | str | None) -> None:
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


def samples_in(batch: Batch) -> int:
    """Number of samples of a batch: the length of its first tensor of two dimensions, else of its last."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    if not tensors:
        raise DataError(f"the batch ({type(batch).__name__}) holds no tensor, so its samples cannot be counted")
    batched = next((t for t in tensors if t.ndim > 1), tensors[-1])
    return batched.shape[0] if batched.ndim else 1


# -- how the losses of batches make up the loss of all the data ---------------------------------------------


def weight_of(scene: Scene, reduction: str) -> Weight:
    """A mean is turned back into a sum, and divided at the end: by samples, class weights or tokens not ignored."""
    if reduction == "sum":
        return 1.0, 0.0
    if scene.known is not None and scene.known.divisor is not None:
        divisor = float(scene.known.divisor())
    else:
        divisor = float(scene.loss.numel() if reduction == "none" else _samples(scene))
    return (divisor if reduction == "mean" else 1.0), divisor


def is_mean(scene: Scene) -> bool:
    """Whether the loss of a batch is a mean; an unknown one is tried on the batch given twice."""
    if scene.known is not None and scene.known.divisor is not None:
        return scene.known.reduction == "mean"
    if scene.loss.ndim > 0:
        return False
    once, twice = float(scene.loss.detach()), _joint_loss(scene, scene)
    return abs(twice - once) <= abs(twice - 2 * once)


def mean_or_sum(scene: Scene, other: Scene) -> str:
    """``"mean"`` or ``"sum"`` over samples: which of the two the loss of both batches is of those of each."""
    one, two, both = float(scene.loss.detach()), float(other.loss.detach()), _joint_loss(scene, other)
    n, m = _samples(scene), _samples(other)
    close = (1e-9 if scene.loss.dtype == torch.float64 else 1e-4) * (abs(one) + abs(two) + abs(both) + 1e-30)
    if abs((n * one + m * two) / (n + m) - both) < close:
        return "mean"
    if abs(one + two - both) < close:
        return "sum"
    raise LossError(
        "this loss over two batches is neither the mean nor the sum over their samples, so kappa of all the data "
        "cannot be put together from batches; give all data as one batch, or use a known loss"
    )


def _samples(scene: Scene) -> int:
    if scene.outputs is None or scene.outputs.ndim == 0:
        raise LossError("the outputs hold no tensor with a batch dimension, so batches cannot be weighted")
    return scene.outputs.shape[0]


def _joint_loss(scene: Scene, other: Scene) -> float:
    """The loss of the samples of two batches as one."""
    one, two = scene.replay, other.replay
    assert one is not None
    assert two is not None
    assert one.criterion is not None
    assert two.criterion is not None
    pairs = (one.outputs, two.outputs), (one.criterion.targets[0], two.criterion.targets[0])
    with torch.no_grad():
        return float(one.criterion.loss_fn(*(tree_map(_join, a, b) for a, b in pairs)))


def _join(a: object, b: object) -> object:
    return torch.cat([a, b]) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim else a
