"""The public path of :mod:`relflat.measure.relatives`: kappa by sample, largest eigenvalues, robustness."""

from relflat.measure.relatives import (
    Estimate,
    feature_robustness,
    max_eigenvalue_flatness,
    per_sample_flatness,
)

__all__ = ["Estimate", "feature_robustness", "max_eigenvalue_flatness", "per_sample_flatness"]
