"""Changes of the weights that leave the network's function as it is.

A measure of flatness that means something must not move under them. Relative flatness does not for
:func:`rescale_layer`, :func:`rescale_neurons` (seen from ``first``), :func:`rotate_features` and
:func:`shift_rows`; it does for :func:`rescale_features`, unless :func:`normalize_features` is applied first.

Functions that act between two layers (:mod:`relflat.theory.rescalings`) change both in place. Functions that act on
the features of one layer (:mod:`relflat.theory.feature_maps`) return a replacement for it, because features cannot be
changed in place: assign it where the layer was. Each refuses layers between which it would change the function;
:func:`preserving` checks a model on data.
"""

from relflat.theory.feature_maps import Scale, normalize_features, rescale_features, rotate_features, shift_rows
from relflat.theory.preserving import preserving
from relflat.theory.rescalings import random_rescaling, rescale_layer, rescale_neurons

__all__ = ["Scale", "normalize_features", "preserving", "random_rescaling", "rescale_features", "rescale_layer"]
__all__ += ["rescale_neurons", "rotate_features", "shift_rows"]
