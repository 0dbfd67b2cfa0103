"""The public path of :mod:`relflat.theory.relatives` and kin: kappa by sample, eigenvalues, robustness."""

from relflat.theory.relatives import Estimate, feature_robustness, max_eigenvalue_flatness, per_sample_flatness
from relflat.theory.representativeness import representativeness
from relflat.theory.spectrum import layer_spectrum as layer_spectrum

__all__ = ["Estimate", "feature_robustness", "max_eigenvalue_flatness", "per_sample_flatness", "representativeness"]
