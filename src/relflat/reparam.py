"""The public path of :mod:`relflat.theory.reparam`: changes of the weights that keep the function."""

from relflat.theory.reparam import (
    Convolution as Convolution,
)
from relflat.theory.reparam import (
    Dense as Dense,
)
from relflat.theory.reparam import (
    Scale as Scale,
)
from relflat.theory.reparam import (
    normalize_features as normalize_features,
)
from relflat.theory.reparam import (
    preserving as preserving,
)
from relflat.theory.reparam import (
    random_rescaling as random_rescaling,
)
from relflat.theory.reparam import (
    rescale_features as rescale_features,
)
from relflat.theory.reparam import (
    rescale_layer as rescale_layer,
)
from relflat.theory.reparam import (
    rescale_neurons as rescale_neurons,
)
from relflat.theory.reparam import (
    rotate_features as rotate_features,
)
from relflat.theory.reparam import (
    shift_rows as shift_rows,
)
