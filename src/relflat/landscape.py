"""The public path of :mod:`relflat.measure.relatives`: kappa by sample, largest eigenvalues, robustness."""

from relflat.measure.relatives import (
    Estimate as Estimate,
)
from relflat.measure.relatives import (
    feature_robustness as feature_robustness,
)
from relflat.measure.relatives import (
    max_eigenvalue_flatness as max_eigenvalue_flatness,
)
from relflat.measure.relatives import (
    per_sample_flatness as per_sample_flatness,
)
from relflat.measure.relatives import (
    representativeness as representativeness,
)
