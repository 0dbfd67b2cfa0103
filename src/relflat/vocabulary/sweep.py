"""The pass over tokens and classes behind ``linear_cross_entropy_fam``; its docstring has the formulas and names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relflat.options import Gradient, Reduction
from relflat.vocabulary.gradients import Gradients
from relflat.vocabulary.rows import Rows, slices
from relflat.vocabulary.softmax import Tokens, softmax

_BUFFER = 2**26  # probabilities at a time, unless chunk_tokens says otherwise: 256 MiB in float32


@dataclass(frozen=True)
class Options:
    """Arguments of ``linear_cross_entropy_fam`` that a sweep needs.

    Attributes:
        strength: lambda.
        gradient: full, frozen or weights.
        reduction: of the loss.
        label_smoothing: s.
        chunk_tokens: tokens at a time; None for as many as make a buffer of 2^26 probabilities.
        chunk_classes: classes at a time.
    """

    strength: float
    gradient: Gradient
    reduction: Reduction
    label_smoothing: float
    chunk_tokens: int | None
    chunk_classes: int


class Inputs(NamedTuple):
    """What the loss can be differentiated in."""

    phi: Float[Tensor, "n m"]
    weight: Float[Tensor, "d m"]
    bias: Float[Tensor, " d"] | None

    @property
    def wide(self) -> torch.dtype:
        """The precision of the sums: float32, or float64 for such inputs."""
        both = torch.promote_types(self.phi.dtype, self.weight.dtype)
        return torch.promote_types(both, torch.float32)


class Fixed(NamedTuple):
    """What it cannot: targets, the directions of a sketch, options."""

    y: Int[Tensor, " n"]
    directions: Float[Tensor, "m k"] | None
    options: Options


class Swept(NamedTuple):
    """What a sweep finds.

    Attributes:
        task: cross-entropy of each token, not weighted.
        kappa: ``||phi||^2 v`` of each token, not weighted.
        gradients: of the weighted total in the inputs; None where not wanted.
    """

    task: Float[Tensor, " n"]
    kappa: Float[Tensor, " n"]
    gradients: tuple[Tensor | None, ...]


def sweep(inputs: Inputs, fixed: Fixed, a: float | Float[Tensor, " n"], wanted: Sequence[bool]) -> Swept:
    """Go over tokens and classes once.

    Args:
        inputs: features, weight and bias.
        fixed: targets, directions, options.
        a: weights of the tokens, or the one of each.
        wanted: which of the inputs to differentiate in.
    """
    o, n, d = fixed.options, len(fixed.y), len(inputs.weight)
    with torch.autocast(inputs.phi.device.type, enabled=False), torch.no_grad():
        rows = Rows(inputs.weight, inputs.bias, fixed.directions, inputs.wide, o.chunk_classes)
        task, kappa = rows.norms.new_empty(n), rows.norms.new_empty(n)
        a = a if isinstance(a, Tensor) else torch.full_like(task, a)
        gradients = Gradients(
            rows,
            [x if wants else None for x, wants in zip(inputs, wanted, strict=True)],
            strength=o.strength,
            smoothing=o.label_smoothing,
            through_features=o.gradient != "weights",
            through_logits=o.gradient == "full",
        )
        size = min(o.chunk_tokens or max(1, _BUFFER // d), n)
        buffer = rows.norms.new_empty(size * d)  # the logits of a chunk of tokens, all classes
        for at in slices(n, size or 1):
            t = _tokens(inputs.phi[at].to(inputs.wide), fixed.y[at, None], a[at, None], o.strength)
            x = softmax(rows, t, o.label_smoothing, buffer)
            task[at], kappa[at] = x.task, x.kappa
            if any(wanted):
                gradients.add(at, t, x)
        gradients.finish()
    return Swept(task, kappa, (gradients.phi, gradients.weight, gradients.bias))


def _tokens(phi: Float[Tensor, "p m"], y: Int[Tensor, "p 1"], a: Float[Tensor, "p 1"], strength: float) -> Tokens:
    norm2 = phi.square().sum(1, keepdim=True)
    return Tokens(phi, y, a, norm2, strength * a * norm2)  # beta = strength a ||phi||^2
