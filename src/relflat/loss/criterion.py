"""The user's loss: called, its errors explained, its Hessian looked up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from relflat.errors import DataError, LossError
from relflat.loss.known import KnownLoss, known_loss, uncompiled


@dataclass(frozen=True, eq=False)
class Criterion:
    """A loss function with the targets of a batch: a function of the outputs alone."""

    loss_fn: Callable[..., Any]
    targets: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    remedy: str | None = None  # what to do where it cannot take the outputs; None raises the error as it is

    def __call__(self, outputs: Any) -> Tensor:
        """The loss of the outputs."""
        try:
            loss = self.loss_fn(outputs, *self.targets, **self.kwargs)
        except IndexError as error:
            if "arget" not in str(error):  # PyTorch's "Target 7 is out of bounds."
                raise
            raise LossError(
                f"{str(error).rstrip('.')}: a target lies outside the classes (outputs of shape "
                f"{tuple(getattr(outputs, 'shape', ()))}); mend the labels or set ignore_index"
            ) from error
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            if self.remedy is None or type(error) not in (TypeError, ValueError, RuntimeError, AttributeError):
                raise
            given = " and ".join(_described(x) for x in (outputs, *self.targets))
            raise DataError(f"the loss cannot take {given}: {error}; {self.remedy}") from error
        if not isinstance(loss, Tensor):
            raise LossError(f"the criterion returned {type(loss).__name__}, not a tensor; wrap it to return its loss")
        return loss

    def known(self, outputs: Any) -> KnownLoss | None:
        """What is known of it as a function of these outputs."""
        return known_loss(self.loss_fn, outputs, self.targets, self.kwargs)

    @property
    def eager(self) -> "Criterion":
        """The same without ``torch.compile``."""
        loss_fn = uncompiled(self.loss_fn)
        return self if loss_fn is self.loss_fn else replace(self, loss_fn=loss_fn)

    @property
    def trained_through(self) -> bool:
        """Whether the loss depends on the model through its targets too: then there is no Gauss-Newton matrix."""
        return any(isinstance(t, Tensor) and t.requires_grad for t in self.targets)


def _described(x: object) -> str:
    shape = f" of shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else ""
    return f"{type(x).__name__}{shape}"


def keep_state_dict_of_criterion(wrapper: nn.Module) -> None:
    """Have a wrapper's ``state_dict`` be that of its ``loss_fn``, in saving and in loading."""
    wrapper._register_state_dict_hook(_without_wrapper)  # type: ignore[no-untyped-call]
    wrapper.register_load_state_dict_pre_hook(_with_wrapper)  # type: ignore[no-untyped-call]


def _without_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}loss_fn.")]:
        state[prefix + key.removeprefix(f"{prefix}loss_fn.")] = state.pop(key)


def _with_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    loss_fn = getattr(module, "loss_fn", None)
    if isinstance(loss_fn, nn.Module):
        for key in loss_fn.state_dict():
            if prefix + key in state:
                state[f"{prefix}loss_fn.{key}"] = state.pop(prefix + key)
