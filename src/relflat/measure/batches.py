"""Data as batches, and how their losses make up that of all the data: as a mean, by a divisor, or as a sum."""

import copy
import dataclasses
import numbers
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from relflat.errors import ConfigError, DataError, LossError
from relflat.estimate.scene import Scene
from relflat.options import takes

Batch = Any
ForwardFn = Callable[[nn.Module, Batch], tuple[Any, Any]]
Weight = tuple[float, float]
"""What a batch's loss is multiplied by to be added up, and what it adds to the divisor (0: there is none)."""


def default_forward(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Run the model on ``(inputs, targets)`` or on a mapping with ``labels``; returns outputs and targets."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"the batch is a mapping without 'labels' (keys {list(batch)}); pass forward=")
        outputs = _called(model, {k: v for k, v in batch.items() if k != "labels"})
        return getattr(outputs, "logits", outputs), batch["labels"]
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise DataError(
            f"a batch must be (inputs, targets) or a mapping with 'labels', not {type(batch).__name__}"
            f"{f' of length {len(batch)}' if isinstance(batch, list | tuple) else ''}; pass forward="
        )
    inputs, targets = batch
    return _called(model, inputs), targets


def _called(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs: of keywords or several arguments where its forward pass takes them, else of one."""
    found = [x for x in leaves(inputs) if not isinstance(x, Tensor)]
    if any(hasattr(x, "__array__") for x in found) or (found and all(isinstance(x, numbers.Number) for x in found)):
        raise DataError(
            f"the inputs of a batch are no tensors ({type(inputs).__name__} of {type(found[0]).__name__}); convert "
            "them (torch.as_tensor), or pass forward="
        )
    args, kwargs = _arguments(model, inputs)
    try:
        return model(*args, **kwargs)
    except _WRONG_INPUTS as error:
        if type(error) not in _WRONG_INPUTS:
            raise
        raise DataError(
            f"{type(model).__name__} cannot take the inputs of a batch ({type(inputs).__name__}): "
            f"{type(error).__name__}: {error}; mend them, or pass forward="
        ) from error


_WRONG_INPUTS = TypeError, ValueError, IndexError, AttributeError, RuntimeError  # themselves, no class under them


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model."""
    several: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        several = (), dict(inputs)
    elif isinstance(inputs, list | tuple):
        several = tuple(inputs), {}
    if several is None or (takes(model.forward, inputs) and not takes(model.forward, *several[0], **several[1])):
        return (inputs,), {}
    return several


class Batches:
    """The data as batches on a device."""

    def __init__(self, data: Any, forward: ForwardFn | None, device: torch.device | str | None) -> None:
        single = isinstance(data, tuple | Mapping) or _as_one(data) or _is_record(data)
        self.data: Iterable[Batch] = [data] if single else data
        self.device, self._forward = device, forward or default_forward
        if not isinstance(self.data, Iterable) or isinstance(data, str):
            raise DataError(
                f"data must be batches or one (inputs, targets) tuple, not {type(data).__name__} (wrap a Dataset in "
                "a DataLoader)"
            )
        if not takes(self._forward, nn.Identity(), None):
            raise ConfigError("forward= must take a model and a batch: forward(model, batch) -> (outputs, targets)")

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Any, Any]:
        """Outputs and targets; the batch itself is left as it is, whatever is taken out of it."""
        found = self._forward(model, moved(batch, self.device))
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise DataError(f"forward= must return (outputs, targets), and it returned {type(found).__name__}")
        return found[0], found[1]

    def must_be_repeatable(self, why: str) -> None:
        """Refuse one-shot iterators."""
        if isinstance(self.data, Iterator):
            raise DataError(f"{why} goes over the data more than once, and it is an iterator; give a list or loader")

    def __iter__(self) -> Iterator[tuple[Batch, Iterator[Batch]]]:
        """Yield every batch with samples, and those after it, which may be looked at before their turn."""
        source, ahead = (batch for batch in self.data if samples_in(batch) != 0), deque[Batch]()

        def later() -> Iterator[Batch]:
            yield from tuple(ahead)
            for batch in source:
                ahead.append(batch)
                yield batch

        while True:
            if not ahead:
                next(later(), None)
            if not ahead:
                return
            yield ahead.popleft(), later()


def _as_one(x: Any) -> bool:
    """Whether an object is moved as a whole, by a ``to`` of its own."""
    return callable(getattr(x, "to", None)) and not isinstance(x, type | nn.Module | Mapping)


def _is_record(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def _mapped(change: Callable[[Any], Any], batch: Batch) -> Batch:
    """A copy of a batch with every leaf changed: of mappings, dataclasses, named and other tuples, and lists."""
    if isinstance(batch, Mapping):
        clone: Any = copy.copy(batch) if isinstance(batch, MutableMapping) else {}  # it may hold more than its items
        clone.update({k: _mapped(change, v) for k, v in batch.items()})
        return clone
    if _as_one(batch):
        return change(batch)
    if isinstance(batch, list | tuple):
        found = [_mapped(change, x) for x in batch]
        return batch._make(found) if hasattr(batch, "_make") else type(batch)(found)
    if not _is_record(batch):
        return change(batch)
    clone = copy.copy(batch)
    for name in (field.name for field in dataclasses.fields(batch)):
        object.__setattr__(clone, name, _mapped(change, getattr(batch, name)))
    return clone


def moved(batch: Batch, device: Any) -> Batch:
    """A copy of a batch with its tensors on a device (None: where they are)."""

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device)
        return copy.copy(x).to(device) if _as_one(x) and device is not None else x  # some move themselves

    return _mapped(move, batch)


def leaves(batch: Batch) -> list[Any]:
    """What a batch holds, at its ends."""
    found: list[Any] = []
    _mapped(found.append, batch)
    return found


def samples_in(batch: Batch) -> int | None:
    """Number of samples of a batch: the length of its first tensor of two dimensions, else of its last.

    None if it holds no tensor where one can be found: then the outputs tell.
    """
    tensors = [t for t in leaves(batch) if isinstance(t, Tensor)]
    if not tensors:
        return None
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


class Reduction:
    """What an unknown loss of one number is over samples: the mean or the sum, by the losses of pairs of batches.

    A pair tells nothing where both losses are 0, or where one batch is far larger than the other, so that it may
    leave both open. Every further pair is compared, and one that fits neither is refused.
    """

    def __init__(self) -> None:
        self.open = {"mean", "sum"}

    @property
    def found(self) -> str | None:
        """Which of them, once that is known."""
        return next(iter(self.open)) if len(self.open) == 1 else None

    def compare(self, scene: Scene, other: Scene) -> None:
        """Strike out what the joint loss of two batches contradicts.

        Raises:
            LossError: it is neither the mean nor the sum of the losses of each, or not the one that it was.
        """
        both = _joint_loss(scene, other)
        if both is None:
            return
        one, two = float(scene.loss.detach()), float(other.loss.detach())
        n, m = _samples(scene), _samples(other)
        close = (1e-9 if scene.loss.dtype == torch.float64 else 1e-4) * (abs(one) + abs(two) + abs(both))
        joint = {"mean": (n * one + m * two) / (n + m), "sum": one + two}
        fits = {name for name, value in joint.items() if abs(value - both) <= close}
        if not self.open & fits:
            known = f"(it was the {self.found} of earlier ones) " if self.found else ""
            raise LossError(
                f"this loss over two batches {known}is {both:.6g} and neither the mean nor the sum over their "
                f"samples ({joint['mean']:.6g}, {joint['sum']:.6g}), so kappa of all the data cannot be put together "
                "from batches; give all data as one batch, or use a known loss"
            )
        self.open &= fits

    def of_one(self, scene: Scene) -> str:
        """The same for a batch by itself, from its loss when given twice."""
        if scene.known is not None and scene.known.divisor is not None:
            return scene.known.reduction
        if scene.loss.ndim > 0:
            return "none"
        if self.found is None:
            self.compare(scene, scene)
        return self.found or self.untold()

    def untold(self) -> str:
        """Refuse, as nothing told."""
        raise LossError(
            "whether this loss is a mean or a sum over samples cannot be told from its values (0, or of batches that "
            "cannot be joined), so batches cannot be put together; give all data as one batch (each rank "
            "two batches), or use a known loss"
        )


def _samples(scene: Scene) -> int:
    if scene.outputs is None or scene.outputs.ndim == 0:
        raise LossError("the outputs hold no tensor with a batch dimension, so batches cannot be weighted")
    return scene.outputs.shape[0]


def _joint_loss(scene: Scene, other: Scene) -> float | None:
    """The loss of the samples of two batches as one; None if they cannot be joined."""
    replays: Any = scene.replay, other.replay
    one, two = replays
    pairs = (one.outputs, two.outputs), (one.criterion.targets[0], two.criterion.targets[0])
    with torch.no_grad():
        try:
            return float(one.criterion.loss_fn(*(tree_map(_join, a, b) for a, b in pairs)))
        except (RuntimeError, ValueError):  # batches of other lengths or forms, or a loss of one size only
            return None


def _join(a: object, b: object) -> object:
    return torch.cat([a, b]) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim else a
