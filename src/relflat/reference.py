"""The public path of :mod:`relflat.theory.reference`: the definitions, dense and obvious."""

from relflat.theory.reference import (
    LossOfWeight as LossOfWeight,
)
from relflat.theory.reference import (
    OutputsOfWeight as OutputsOfWeight,
)
from relflat.theory.reference import (
    at_layer as at_layer,
)
from relflat.theory.reference import (
    feature_robustness as feature_robustness,
)
from relflat.theory.reference import (
    kappa as kappa,
)
from relflat.theory.reference import (
    kappa_adaptive as kappa_adaptive,
)
from relflat.theory.reference import (
    kappa_ggn as kappa_ggn,
)
from relflat.theory.reference import (
    kappa_in_output_space as kappa_in_output_space,
)
from relflat.theory.reference import (
    kappa_normalized as kappa_normalized,
)
from relflat.theory.reference import (
    kappa_of_hessian as kappa_of_hessian,
)
from relflat.theory.reference import (
    layer_ggn as layer_ggn,
)
from relflat.theory.reference import (
    layer_hessian as layer_hessian,
)
from relflat.theory.reference import (
    layerwise as layerwise,
)
from relflat.theory.reference import (
    max_eigenvalue as max_eigenvalue,
)
from relflat.theory.reference import (
    outputs_at_layer as outputs_at_layer,
)
from relflat.theory.reference import (
    trace as trace,
)
