"""Relative flatness for PyTorch: measure it exactly, train with it at the cost of plain training."""

from relflat.errors import (
    ConfigError,
    DataError,
    GraphError,
    LayerError,
    LossError,
    NonFiniteError,
    RelflatError,
    RelflatWarning,
    SecondDerivativeError,
)
from relflat.fam import FAM
from relflat.measure.api import relative_flatness, relative_flatness_by_layer
from relflat.result import Flatness
from relflat.theory.relatives import Estimate, feature_robustness, max_eigenvalue_flatness, per_sample_flatness
from relflat.theory.representativeness import representativeness
from relflat.vocabulary.function import LinearCrossEntropy, linear_cross_entropy_fam

__version__ = "0.1.0"

__all__ = [
    "FAM",
    "ConfigError",
    "DataError",
    "Estimate",
    "Flatness",
    "GraphError",
    "LayerError",
    "LinearCrossEntropy",
    "LossError",
    "NonFiniteError",
    "RelflatError",
    "RelflatWarning",
    "SecondDerivativeError",
    "feature_robustness",
    "linear_cross_entropy_fam",
    "max_eigenvalue_flatness",
    "per_sample_flatness",
    "relative_flatness",
    "relative_flatness_by_layer",
    "representativeness",
]
