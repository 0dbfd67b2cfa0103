"""The public path of :mod:`relflat.theory.relatives` and its kin: kappa by sample, eigenvalues, robustness."""

from relflat.theory.relatives import Estimate, feature_robustness, max_eigenvalue_flatness, per_sample_flatness
from relflat.theory.representativeness import representativeness
from relflat.theory.spectrum import layer_spectrum

__all__ = ["Estimate", "feature_robustness", "layer_spectrum", "max_eigenvalue_flatness", "per_sample_flatness"]
__all__ += ["representativeness"]
