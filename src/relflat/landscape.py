"""The public path of :mod:`relflat.theory.relatives`: kappa by sample, largest eigenvalues, robustness."""

from relflat.theory.relatives import Estimate, feature_robustness, max_eigenvalue_flatness, per_sample_flatness
from relflat.theory.representativeness import representativeness

__all__ = ["Estimate", "feature_robustness", "max_eigenvalue_flatness", "per_sample_flatness", "representativeness"]
