"""Relative flatness for PyTorch: measure it exactly, train with it at the cost of plain training."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from relflat.integrations.monitor import Monitor
    from relflat.theory.loss_along import loss_along
    from relflat.theory.measures import measures
    from relflat.theory.suggest import suggest

__version__ = "0.1.0"
_LATER = {"Monitor": "integrations.monitor", **{n: f"theory.{n}" for n in ("loss_along", "measures", "suggest")}}


def __getattr__(name: str) -> Any:  # what is in _LATER is imported when it is asked for
    if name not in _LATER:
        raise AttributeError(f"module 'relflat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"relflat.{_LATER[name]}"), name)


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
    "Monitor",
    "NonFiniteError",
    "RelflatError",
    "RelflatWarning",
    "SecondDerivativeError",
    "feature_robustness",
    "linear_cross_entropy_fam",
    "loss_along",
    "max_eigenvalue_flatness",
    "measures",
    "per_sample_flatness",
    "relative_flatness",
    "relative_flatness_by_layer",
    "representativeness",
    "suggest",
]
