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
from relflat.estimate.contributions import Contributions
from relflat.loss.hessians import DiagonalHessian, LogitHessian
from relflat.loss.known import KnownLoss
from relflat.options import Options


def why_not(calls: Sequence[Call], known: KnownLoss | None) -> str | None:
    """The reason why no closed form applies to these calls of a layer, or None if one does."""
    if known is None:
        return "the loss is not one whose Hessian is known (CrossEntropyLoss, BCEWithLogitsLoss, MSELoss)"
    if not calls:
        return "it is a parameter, and only output layers have one"
    if len(calls) != 1:
        return f"the layer was called {len(calls)} times"
    (call,) = calls
    if vars(call.module).get("groups", 1) != 1:
        return "the layer is a grouped convolution"
    if not known.elementwise and known.rows().shape[-1] != call.weight.shape[0]:
        return "it is not the output layer, whose outputs are the classes of the loss"
    aligned = same_values(call, *_aligned(call, known))
    return None if aligned else "something is computed between the layer's output and the loss"


def seen_without_graph(call: Call, known: KnownLoss | None) -> bool:
    """Whether the outputs can be recognised as the layer's under ``no_grad``: they share its memory."""
    return known is not None and same_memory(*_aligned(call, known))


def closed_form(space: OutputSpace, hessian: LogitHessian, options: Options) -> Contributions:
    """Each row's share. Cost: one product of the size of the layer's own (adaptive: two)."""
    return from_features(space.features.flatten(0, 2), space.weight, hessian, options)


def from_features(
    phi: Float[Tensor, "p m"], weight: Float[Tensor, "d m"], hessian: LogitHessian, options: Options
) -> Contributions:
    """The same from the features of each row."""
    kappa = (phi.square() * hessian.diagonal(weight)).sum(-1) if options.adaptive else hessian.kappa(weight, phi)
    trace = (phi.square().sum(-1) * hessian.trace())[None] if options.trace else None
    return Contributions(kappa[None], trace, "closed_form", True)


def by_rows(call: Call, hessian: LogitHessian) -> LogitHessian:
    """The blocks ``A_p`` with respect to the rows of the layer's output."""
    if isinstance(hessian, DiagonalHessian):  # the loss may see (n,) where the layer gave (n, 1)
        return DiagonalHessian(call.rows(hessian.a.reshape(call.output.shape)).flatten(0, 1))
    return hessian


def _aligned(call: Call, known: KnownLoss) -> tuple[Tensor, Tensor]:
    """Logits and layer's output, each as rows where the loss needs whole ones."""
    if known.elementwise:
        return known.outputs, call.output
    return known.rows(), call.outputs_last()
