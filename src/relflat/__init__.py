"""Relative flatness for PyTorch: measure it exactly, train with it at the cost of plain training."""

import importlib.util
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

if TYPE_CHECKING:
    from relflat.fam import FAM
    from relflat.integrations.monitor import Monitor
    from relflat.measure.api import relative_flatness, relative_flatness_by_layer
    from relflat.result import Flatness
    from relflat.theory.loss_along import loss_along
    from relflat.theory.measures import measures
    from relflat.theory.relatives import Estimate, feature_robustness, max_eigenvalue_flatness, per_sample_flatness
    from relflat.theory.representativeness import representativeness
    from relflat.theory.suggest import suggest
    from relflat.vocabulary.function import LinearCrossEntropy, linear_cross_entropy_fam

__version__ = "0.1.0"
_LATER = {"FAM": "fam", "Flatness": "result", "Monitor": "integrations.monitor"}
_LATER |= dict.fromkeys(["relative_flatness", "relative_flatness_by_layer"], "measure.api")
_LATER |= dict.fromkeys(["LinearCrossEntropy", "linear_cross_entropy_fam"], "vocabulary.function")
_ESTIMATES = ["Estimate", "feature_robustness", "max_eigenvalue_flatness", "per_sample_flatness"]
_LATER |= dict.fromkeys(_ESTIMATES, "theory.relatives")
_LATER |= {name: f"theory.{name}" for name in ("loss_along", "measures", "representativeness", "suggest")}


def __getattr__(name: str) -> Any:  # PyTorch takes seconds to import, so what needs it is when it is asked for
    if name in _LATER:
        globals()[name] = getattr(importlib.import_module(f"relflat.{_LATER[name]}"), name)
        return globals()[name]
    if name.startswith("_") or importlib.util.find_spec(f"relflat.{name}") is None:
        raise AttributeError(f"module 'relflat' has no attribute {name!r}")
    return importlib.import_module(f"relflat.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["FAM", "ConfigError", "DataError", "Estimate", "Flatness", "GraphError", "LayerError"]
__all__ += ["LinearCrossEntropy", "LossError", "Monitor", "NonFiniteError", "RelflatError", "RelflatWarning"]
__all__ += ["SecondDerivativeError", "feature_robustness", "linear_cross_entropy_fam", "loss_along"]
__all__ += ["max_eigenvalue_flatness", "measures", "per_sample_flatness", "relative_flatness"]
__all__ += ["relative_flatness_by_layer", "representativeness", "suggest"]
