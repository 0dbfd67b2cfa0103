"""What a measurement returns: plain frozen records that carry their own error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from relflat.plot.shown import Shown


@dataclass(frozen=True)
class Flatness(Shown):
    """Relative flatness of one layer over a data set; ``float(flat)`` and comparisons are of its value.

    Attributes:
        value: kappa(W), Petzka et al. 2021, Def. 3. Larger is sharper. Units: those of the loss.
        stderr: standard error of ``value`` over the probes; 0.0 where the method is exact.
        method: how it was computed, e.g. ``"closed_form"`` or ``"probe(ggn, 8)"``.
        layer: qualified name of the layer.
        curvature: ``"hessian"`` or ``"ggn"``, whichever ``value`` is made of.
        trace: Tr(H), trace of the layer's Hessian (or GGN), d m x d m; nan for ``finite_difference`` and
            ``xtrace``, as are the two made of it, ``trace_stderr`` and ``layerwise``.
        trace_stderr: standard error of ``trace``.
        layerwise: ``||W||_F^2 Tr(H)``, the layerwise measure of the FAM paper (section 3).
        weight_norm: ``||W||_F``.
        feature_norm2: mean over samples of ``||phi||^2`` (summed over the positions of one sample).
        loss: the loss over the same data.
        confidence: mean of ``max_c p_c`` over the targets that count, for classification losses; else None.
        samples: number of samples.
    """

    value: float
    stderr: float
    method: str
    layer: str
    curvature: str
    trace: float
    trace_stderr: float
    layerwise: float
    weight_norm: float
    feature_norm2: float
    loss: float
    confidence: float | None
    samples: int


def step_in_numbers(
    task: Any, penalty: Any, strength: float | None = None, kappas: Mapping[str, Tensor] | None = None, **rest: Any
) -> dict[str, Any]:
    """What ``FAM.last`` says of a step, made from tensors only when it is asked for."""
    found = {
        k: float(v.mean()) if isinstance(v, Tensor) else v
        for k, v in {"task": task, "penalty": penalty, **rest}.items()
    }
    found = {"total": found["task"] + found["penalty"], **found}
    if strength is not None:
        found["strength"] = float(strength)
    if kappas is not None:  # shares of samples average as their losses do
        found["by_layer"] = {k: float(v.mean(0).sum()) / max(1, task.numel()) for k, v in kappas.items()}
    return found
