"""Exact kappa of an output layer whose loss is known: identities I1, I2 and I9, no Hessian formed.

Between the layer and the loss nothing is computed, so the Hessian with respect to the layer's output is
block-diagonal over rows ``p`` (samples, tokens, pixels) with the known blocks ``A_p``, and

    kappa = sum_p ||phi_p||^2 Tr(W' A_p W)        kappa_adaptive = sum_p sum_t phi_pt^2 (W' A_p W)_tt.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from relflat.capture.calls import Call, same_values
from relflat.capture.graph import same_memory
from relflat.curvature.output_space import OutputSpace
from relflat.loss.hessians import DiagonalHessian, LogitHessian
from relflat.loss.known import KnownLoss


def why_not(calls: Sequence[Call], outputs: Tensor | None, known: KnownLoss | None) -> str | None:
    """The reason why no closed form applies to these calls of a layer, or None if one does."""
    if known is None or outputs is None:
        return "the loss is not one whose Hessian is known (CrossEntropyLoss, BCEWithLogitsLoss, MSELoss)"
    if not calls:
        return "it is a parameter, and only output layers have one"
    if len(calls) != 1:
        return f"the layer was called {len(calls)} times"
    (call,) = calls
    if getattr(call.module, "groups", 1) != 1:
        return "the layer is a grouped convolution"
    if known.elementwise:
        aligned = same_values(call, outputs, call.output)
    else:
        if known.classes_last(outputs).shape[-1] != call.weight.shape[0]:
            return "it is not the output layer, whose outputs are the classes of the loss"
        aligned = same_values(call, known.classes_last(outputs), call.outputs_last())
    return None if aligned else "something is computed between the layer's output and the loss"


def seen_without_graph(call: Call, outputs: Tensor | None, known: KnownLoss | None) -> bool:
    """Whether the outputs can be recognised as the layer's under ``no_grad``: they share its memory."""
    if known is None or outputs is None:
        return False
    if known.elementwise:
        return same_memory(outputs, call.output)
    return same_memory(known.classes_last(outputs), call.outputs_last())


def logit_hessian(
    space: OutputSpace, known: KnownLoss, outputs: Float[Tensor, "..."], targets: Tensor
) -> LogitHessian:
    """The blocks ``A_p`` with respect to the rows of the layer's output."""
    hessian = known.hessian(outputs, targets)
    if isinstance(hessian, DiagonalHessian):  # the loss may see (n,) where the layer gave (n, 1)
        call = space.calls[0]
        return DiagonalHessian(call.rows(hessian.a.reshape(call.output.shape)).flatten(0, 1))
    return hessian


def kappa_rows(
    energy: Float[Tensor, "p m"], weight: Float[Tensor, "d m"], hessian: LogitHessian, *, adaptive: bool
) -> Float[Tensor, " p"]:
    """Each row's share of kappa. Cost: one product of the size of the layer's own (adaptive: two)."""
    if adaptive:
        return (energy * hessian.diagonal(weight)).sum(-1)
    return energy.sum(-1) * hessian.total(weight)


def trace_rows(energy: Float[Tensor, "p m"], hessian: LogitHessian) -> Float[Tensor, " p"]:
    """Each row's share of ``Tr H``, H the Hessian with respect to the layer's weight."""
    return energy.sum(-1) * hessian.trace()


def squared_features(space: OutputSpace) -> Float[Tensor, "p m"]:
    """Squares of the features of each row."""
    return space.features.flatten(0, 2).square()
