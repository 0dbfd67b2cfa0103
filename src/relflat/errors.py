"""Errors and warnings: each message names the thing, the value and the remedy."""

import functools
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

_PLACES = [spec.origin for spec in map(find_spec, ("relflat", "torch")) if spec is not None]
_NOT_THE_USERS = (*(f"{Path(str(place)).parent}/" for place in _PLACES), functools.__file__)


class RelflatError(Exception):
    """Base of every error that relflat raises on purpose."""


class LayerError(RelflatError, ValueError):
    """A layer is unknown, ambiguous, unused, of an unsupported class, or frozen where it must not be."""


class GraphError(RelflatError, RuntimeError):
    """The forward pass, the loss and the criterion do not fit together (order of calls, detached tensors)."""


class SecondDerivativeError(GraphError):
    """An operation after the layer cannot be differentiated twice."""


class LossError(RelflatError, ValueError):
    """The loss lacks the curvature asked for, or its scale over batches is unknown."""


class DataError(RelflatError, ValueError):
    """The data given are empty, malformed, or not there."""


class ConfigError(RelflatError, ValueError):
    """An argument, key or name is not one of those accepted."""


class ArgumentError(ConfigError, TypeError):
    """A call has an argument that is unknown, missing or given twice."""


class NonFiniteError(RelflatError, FloatingPointError):
    """A measured quantity is infinite or not a number."""


class RelflatWarning(UserWarning):
    """Something the user should know and may act on; nothing was silently changed."""


def warn(message: str) -> None:
    """Give a :class:`RelflatWarning` at the line of the user: the nearest not in this library, torch or functools."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RelflatWarning, stacklevel=level)
