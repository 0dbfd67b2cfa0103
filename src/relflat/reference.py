"""The definitions of relative flatness and its relatives, dense and in float64: the public path of the theory.

They stand in :mod:`relflat.theory.definitions`; :mod:`relflat.theory.at_layer` makes what they take from a model.
"""

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

__all__ = [
    "LossOfWeight",
    "OutputsOfWeight",
    "at_layer",
    "feature_robustness",
    "kappa",
    "kappa_adaptive",
    "kappa_ggn",
    "kappa_in_output_space",
    "kappa_normalized",
    "kappa_of_hessian",
    "layer_ggn",
    "layer_hessian",
    "layerwise",
    "max_eigenvalue",
    "outputs_at_layer",
    "trace",
]
