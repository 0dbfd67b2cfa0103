"""A recorded forward pass and its loss, run once more: with a change, or without compiled and fused kernels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from relflat.capture.calls import Forward, autocast_now
from relflat.capture.outputs import same_part
from relflat.capture.tap import Inject, Tap
from relflat.errors import GraphError
from relflat.loss.criterion import Criterion
from relflat.loss.reading import without_constants
from relflat.rng import rng_preserved


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within the block compiled code runs as it was written, and attention as products and a softmax."""
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True, eq=False)
class Replay:
    """The passes behind a loss, of which a single one can be repeated, and what the loss was computed from.

    Dropout masks are those of the record (if the tap keeps random states); buffers such as BatchNorm statistics are
    left alone, and so are the global random number generators.

    Attributes:
        outputs: what the criterion was given; without a criterion the loss itself, as the model returned it.
        factor: what that was multiplied by since, without a criterion.
        again: makes outputs and targets from the model anew, in place of the recorded call.
    """

    tap: Tap
    forwards: Sequence[Forward]
    outputs: Any
    criterion: Criterion | None
    factor: float = 1.0
    again: Callable[[nn.Module], tuple[Any, Any]] | None = None

    @classmethod
    def of_loss(cls, tap: Tap, forwards: Sequence[Forward], loss: Tensor) -> "Replay | None":
        """That of a loss among what the model returned, perhaps multiplied by constants; None for any other."""
        leaves = [x for x in tree_leaves(forwards[-1].outputs) if isinstance(x, Tensor) and x.numel() == 1]
        node, factor = without_constants(loss.grad_fn, until=[x.grad_fn for x in leaves])
        given = next((x for x in leaves if x.grad_fn is node and node is not None), None)
        return None if given is None or len(forwards) > 1 else cls(tap, forwards, given, None, factor)

    def loss(self, *, inject: Inject | None = None, change: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The loss of the only pass, run once more with other inputs to tapped layers, or another parameter."""
        return self._run(inject, change)[1]

    def plainly(self) -> tuple[Forward, Any, Tensor]:
        """The pass once more by :func:`plain_kernels`, what of it the criterion is given, and the loss."""
        tap = Tap(self.tap.model, list(self.tap.layers.values()), measuring=True)
        try:
            with plain_kernels():
                part, loss = self._run(None, None)
            tap.expect_none()
            return tap.take()[-1], part, loss
        finally:
            tap.close()

    def loss_of(self, outputs: Tensor, given: Tensor | None = None) -> Tensor | None:
        """The loss with other outputs in the place of those ``given``, by default all; no pass; None if it cannot."""
        if self.criterion is None:
            return None
        if isinstance(self.outputs, Tensor):
            return self.criterion(outputs)
        if given is None or not any(x is given for x in tree_leaves(self.outputs)):
            return None
        return self.criterion(tree_map(lambda x: outputs if x is given else x, self.outputs))

    def _as_then(self, inject: Inject | None) -> ExitStack:
        """The random state and the precision of the pass."""
        stack, record = ExitStack(), self.forwards[0]
        stack.enter_context(self.tap.replaying(inject))
        stack.enter_context(rng_preserved(record.rng))
        for device, (on, dtype) in (record.autocast or autocast_now(off=True)).items():
            stack.enter_context(torch.autocast(device, dtype, enabled=on))
        return stack

    def _run(self, inject: Inject | None, change: tuple[Tensor, Tensor] | None) -> tuple[Any, Tensor]:
        """What the criterion takes of one more pass, and the loss."""
        if len(self.forwards) != 1 and self.again is None:
            raise GraphError(
                f"radius and finite differences repeat one forward pass, and there were {len(self.forwards)} since "
                "the last call of the criterion; call it once after each, or use another method"
            )
        record, model = self.forwards[0], self.tap.model
        replaced: dict[str, Tensor] = {name: b.clone() for name, b in model.named_buffers()}
        if change is not None:
            replaced |= {n: change[1] for n, p in model.named_parameters() if p is change[0]}
        with self._as_then(inject):
            if self.again is not None and self.criterion is not None:
                again, named = _Again(model, self.again), {f"model.{name}": x for name, x in replaced.items()}
                outputs, targets = torch.func.functional_call(again, named, ())
                return outputs, replace(self.criterion, targets=(targets,))(outputs)
            replayed = torch.func.functional_call(model, replaced, record.args, record.kwargs)
        part = same_part(record.outputs, self.outputs, replayed)
        return part, self.factor * part if self.criterion is None else self.criterion(part)


class _Again(nn.Module):
    """What makes outputs and targets, as a module whose parameters can be replaced."""

    def __init__(self, model: nn.Module, again: Callable[[nn.Module], tuple[Any, Any]]) -> None:
        super().__init__()
        self.model, self.again = model, again

    def forward(self) -> tuple[Any, Any]:
        return self.again(self.model)
