"""The definitions of kappa and its relatives, dense and in float64: public path of `relflat.theory.definitions`."""

from relflat.theory.at_layer import LossOfWeight, OutputsOfWeight, at_layer, outputs_at_layer
from relflat.theory.definitions import (
    feature_robustness,
    kappa,
    kappa_adaptive,
    kappa_ggn,
    kappa_in_output_space,
    kappa_normalized,
    kappa_of_hessian,
    layer_ggn,
    layer_hessian,
    layerwise,
    max_eigenvalue,
    trace,
)

__all__ = ["LossOfWeight", "OutputsOfWeight", "at_layer", "feature_robustness", "kappa", "kappa_adaptive"]
__all__ += ["kappa_ggn", "kappa_in_output_space", "kappa_normalized", "kappa_of_hessian", "layer_ggn"]
__all__ += ["layer_hessian", "layerwise", "max_eigenvalue", "outputs_at_layer", "trace"]
