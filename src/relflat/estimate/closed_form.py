"""Exact kappa of an output layer whose loss is known: identities I1, I2 and I9, no Hessian formed.

Between the layer and the loss nothing is computed, so the Hessian with respect to the layer's output is
block-diagonal over rows ``p`` (samples, tokens, pixels) with the known blocks ``A_p``, and

    kappa = sum_p ||phi_p||^2 Tr(W' A_p W)        kappa_adaptive = sum_p sum_t phi_pt^2 (W' A_p W)_tt.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.calls import Call, same_memory, same_values
from relflat.capture.kinds import rows
from relflat.curvature.output_space import Site
from relflat.loss.known import DiagonalHessian, KnownLoss, LogitHessian


def why_not(calls: list[Call], outputs: Tensor | None, known: KnownLoss | None) -> str | None:
    """The reason why no closed form applies to these calls of a layer, or None if one does."""
    if known is None or outputs is None:
        return "the loss is not one whose Hessian is known (CrossEntropyLoss, BCEWithLogitsLoss, MSELoss)"
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
    site: Site, known: KnownLoss, outputs: Float[Tensor, "..."], targets: Tensor
) -> LogitHessian:
    """The blocks ``A_p`` with respect to the rows of the layer's output."""
    hessian = known.hessian(outputs, targets)
    if isinstance(hessian, DiagonalHessian):  # the loss may see (n,) where the layer gave (n, 1)
        call = site.calls[0]
        return DiagonalHessian(
            rows(call.kind, call.module, hessian.a.reshape(call.output.shape)).flatten(0, 1)
        )
    return hessian


def kappa_rows(
    site: Site, hessian: LogitHessian, *, adaptive: bool, unit_features: bool = False
) -> Float[Tensor, " p"]:
    """Each row's share of kappa. Cost: one product of the size of the layer's own (adaptive: two)."""
    energy = _energy(site, unit_features)
    if adaptive:
        return (energy * hessian.diagonal(site.weight)).sum(-1)
    return energy.sum(-1) * hessian.total(site.weight)


def trace_rows(site: Site, hessian: LogitHessian, *, unit_features: bool = False) -> Float[Tensor, " p"]:
    """Each row's share of ``Tr H``, H the Hessian with respect to the layer's weight."""
    return _energy(site, unit_features).sum(-1) * hessian.trace()


def _energy(site: Site, unit: bool) -> Float[Tensor, "p m"]:
    """Squares of the features of each row; if ``unit`` of norm 1, or 0 for a row of zeros."""
    energy = site.features.flatten(0, 2).square()
    if unit:
        total = energy.sum(-1, keepdim=True)
        energy = energy / torch.where(total > 0, total, 1.0)
    return energy
