"""What can go wrong while training with a penalty, watched for and said once: not a number, negative, collapsed."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relflat.errors import warn

_EVERY, _SPREAD, _PATIENCE = 10, 1e-3, 5


class Guards:
    """Checks of each step; every kind of trouble is said once, as a :class:`RelflatWarning`."""

    def __init__(self) -> None:
        self.skipped = 0  # penalties left out as something was not finite
        self.collapsed: list[str] = []  # what did not vary over the samples of a batch when last looked at
        self._in_a_row: Counter[str] = Counter()
        self._said: set[str] = set()

    def finite(self, what: str, value: Tensor, step: int) -> bool:
        """Whether all of a tensor is finite; counts where it is not."""
        finite = torch.isfinite(value.detach())
        if bool(finite.all()):
            return True
        self.skipped += 1
        self._left_out(f"{what} is {float(value.detach()[~finite][0])}", step)
        return False

    def _kept(self, lost: Sequence[str], step: int) -> bool:
        """Whether the kappa of no layer lost its gradient; counts where one did."""
        if lost:
            self.skipped += 1
            self._left_out(
                f"the gradient of kappa of layer {lost[0]!r} is nan (a norm or root at 0 has no higher derivatives)",
                step,
            )
        return not lost

    def judge(
        self, kappas: Mapping[str, Tensor], step: int, *, may_be_negative: bool, lost: Sequence[str] = ()
    ) -> bool:
        """Whether the kappa of every layer is finite, waiting for the device once, and none ``lost`` its gradient.

        Negative ones are named.
        """
        for layer, kappa in kappas.items() if may_be_negative and "negative" not in self._said else ():
            value = float(kappa.detach().mean(0).sum())
            if value < 0:
                self._say(
                    "negative",
                    f"kappa of layer {layer!r} is {value:.3g}, or estimated so: off a minimum it may be. Minimising "
                    "it then seeks negative curvature, not flatness; curvature='ggn' of a convex loss is never "
                    "negative",
                )
        each = [torch.isfinite(v.detach()).all() for v in kappas.values()]
        if not each or bool(torch.stack([x.to(each[0].device) for x in each]).all()):
            return self._kept(lost, step)
        return all(self.finite(f"kappa of layer {layer!r}", value, step) for layer, value in kappas.items())

    def collapse(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Look, every ``_EVERY`` steps, whether tensors (samples first) still depend on the input.

        The skull experiment of the FAM paper ended in a constant: from strength .02 on all of its metrics were
        the same on two evaluation sets. Such a network has a small kappa, so kappa does not show it.
        """
        if step % _EVERY:
            return
        several = {n: t for n, t in tensors.items() if t.ndim > 1 and t.shape[0] > 1}
        self.collapsed = [name for name, t in several.items() if spread(t) < _SPREAD]
        for name in tensors:
            self._in_a_row[name] = self._in_a_row[name] + 1 if name in self.collapsed else 0
            if self._in_a_row[name] == _PATIENCE:
                self._say(
                    f"collapse {name}",
                    f"{name} no longer depend on the input: over the last {_PATIENCE * _EVERY} steps they varied by "
                    f"less than {_SPREAD:g} of their size from sample to sample. The network has collapsed to a "
                    "constant, which is flat and useless; lower strength or radius",
                )

    def _left_out(self, why: str, step: int) -> None:
        self._say(
            "finite",
            f"{why} at step {step}: the penalty is left out of this step and of any like it (counted in "
            "last['skipped']); lower the learning rate or strength, or check the inputs",
        )

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(message)


def spread(x: Tensor) -> float:
    """Root mean square deviation from the batch mean over the root mean square; 1 for all zeros."""
    x = x.detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.float()
    size = float(x.square().mean())
    return float((x - x.mean(0)).square().mean() / size) ** 0.5 if size > 0 else 1.0
