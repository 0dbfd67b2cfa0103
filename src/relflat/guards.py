"""What can go wrong while training with a penalty, watched for and said once: not a number, negative, collapsed.

Nothing here waits for a device. Where looking at a number would, anywhere but on a CPU, a penalty that is not finite
is left out by the device itself, and what it found is read when it has long been done, or when asked for.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from relflat.capture.graph import hold_back
from relflat.errors import warn

_EVERY, _SPREAD, _PATIENCE = 10, 1e-3, 5
_EVALUATION = (
    "a loss without a penalty was differentiated, as the model was in evaluation mode: if that was a training step, "
    "call model.train() before it (to hold normalisation or dropout fixed, put those modules alone in evaluation "
    "mode, after that); if not, call criterion.eval() as well, or the criterion inside"
)


def waits(x: Tensor) -> bool:
    """Whether looking at a number waits for all that its device has to do before."""
    return x.device.type != "cpu"


class Guards:
    """Checks of each step; every kind of trouble is said once, as a :class:`RelflatWarning`."""

    def __init__(self) -> None:
        self._skipped: int | Tensor = 0
        self._collapsed: list[str] = []
        self._steps = 0
        self._looked: tuple[list[str], list[str], Callable[[], list[float]]] | None = None
        self._in_a_row: Counter[str] = Counter()
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_looked": None}  # is of this process

    @property
    def skipped(self) -> int:
        """Penalties left out as something was not finite."""
        return int(self._skipped)

    @property
    def collapsed(self) -> list[str]:
        """What did not vary over the samples of a batch when last looked at."""
        self.read()
        return self._collapsed

    def finite(self, what: str, value: Tensor, step: int) -> bool:
        """Whether all of a tensor is finite, counted where it is not; taken for granted where a look would wait."""
        if waits(value):
            return True
        value = value.detach()
        if math.isfinite(value.item()) if value.numel() == 1 else bool(torch.isfinite(value).all()):
            return True
        self._leave_out(f"{what} is {float(value[~torch.isfinite(value)][0])} at step {step}")
        return False

    def judge(
        self,
        penalty: Tensor,
        kappas: Mapping[str, Tensor],
        step: int,
        *,
        lost: Sequence[str] = (),
        beyond: Callable[[], Collection[Node]] = tuple,
    ) -> Tensor | None:
        """The penalty where it is finite; else None, or where a look would wait a 0 that sends nothing back.

        For the message ``kappas`` are what it was made of, by layer; ``lost`` are the layers whose kappa lost its
        gradient, ``beyond`` gives the nodes of the task loss, where the graph of the penalty ends.
        """
        if lost:
            why = "is nan (a norm or root at 0 has no higher derivatives)"
            self._leave_out(f"the gradient of kappa of layer {lost[0]!r} {why} at step {step}")
            return None
        if waits(penalty):
            finite = torch.isfinite(penalty.detach()).all()
            self._skipped = self._skipped + ~finite
            hold_back(penalty.grad_fn, beyond(), unless=finite)
            return torch.where(finite, penalty, 0.0)
        if math.isfinite((penalty if penalty.ndim == 0 else penalty.sum()).item()):
            return penalty
        named = {f"kappa of layer {layer!r}": kappa for layer, kappa in kappas.items()} | {"the penalty": penalty}
        return penalty if all(self.finite(what, x, step) for what, x in named.items()) else None

    def look(self, tensors: Callable[[], Mapping[str, Tensor]], kappas: Mapping[str, Tensor]) -> None:
        """At every tenth penalty, look whether tensors (samples first) depend on the input, and at signs of kappas.

        The skull experiment of the FAM paper ended in a constant: from strength .02 on all of its metrics were
        the same on two evaluation sets. Such a network has a small kappa, so kappa does not show it.
        """
        self._steps += 1
        if self._steps % _EVERY != 1:
            return
        self.read()
        spreads = {n: spread(t) for n, t in tensors().items() if t.ndim > 1 and t.shape[0] > 1}
        found = [*spreads.values(), *(k.detach().mean(0).sum().float() for k in kappas.values())]
        found += [self._skipped] if isinstance(self._skipped, Tensor) else []
        if found:
            values = torch.stack([v.to(found[0]) for v in found])
            self._looked = list(spreads), list(kappas), _fetched(values)
            if not waits(values):
                self.read()

    def look_for_training(self, loss: Tensor) -> None:
        """Say it if a loss that has no penalty, as the model is in evaluation mode, is differentiated."""
        if loss.grad_fn is not None and "evaluation" not in self._said:
            loss.grad_fn.register_prehook(lambda _: self._say("evaluation", _EVALUATION))

    def read(self) -> None:
        """Take in what was last looked at."""
        if self._looked is None:
            return
        (names, layers, fetched), self._looked = self._looked, None
        values = fetched()
        self._collapsed = [name for name, value in zip(names, values, strict=False) if value < _SPREAD]
        for name in names:
            self._in_a_row[name] = self._in_a_row[name] + 1 if name in self._collapsed else 0
            if self._in_a_row[name] == _PATIENCE:
                self._say(
                    f"collapse {name}",
                    f"{name} no longer depend on the input: over the last {_PATIENCE * _EVERY} steps they varied by "
                    f"less than {_SPREAD:g} of their size from sample to sample. The network has collapsed to a "
                    "constant, which is flat and useless; lower strength or radius",
                )
        for layer, value in zip(layers, values[len(names) :], strict=False):
            if value < 0:
                self._say(
                    "negative",
                    f"kappa of layer {layer!r} is {value:.3g}, or estimated so: off a minimum it may be. Minimising "
                    "it then seeks negative curvature, not flatness; curvature='ggn' of a convex loss is never "
                    "negative",
                )
        if sum(values[len(names) + len(layers) :]) > 0:
            self._left_out("kappa or the task loss was not finite")

    def _leave_out(self, why: str) -> None:
        self._skipped = self._skipped + 1
        self._left_out(why)

    def _left_out(self, why: str) -> None:
        self._say(
            "finite",
            f"{why}: the penalty is left out of this step and of any like it (counted in "
            "last['skipped']); lower the learning rate or strength, or check the inputs",
        )

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(message)


def spread(x: Tensor) -> Tensor:
    """Root mean square deviation from the batch mean over the root mean square; 1 for all zeros."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    size = x.square().mean()
    return torch.where(size > 0, (x - x.mean(0)).square().mean() / size, 1.0).sqrt()


def _fetched(values: Tensor) -> Callable[[], list[float]]:
    """Numbers that come over from their device while it works on; to be called when they are needed."""
    there, done = values.to("cpu", non_blocking=values.is_cuda), None
    if values.is_cuda:
        done = torch.cuda.current_stream(values.device).record_event()

    def get() -> list[float]:
        if done is not None:
            done.synchronize()
        return there.tolist()

    return get
