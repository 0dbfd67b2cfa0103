"""The options of FAM and of measuring in one record, and the checks of all arguments in one table.

A new option of FAM is a field of ``Options``, with its check in ``_ARGUMENTS``; an argument of
:class:`relflat.FAM`, with its meaning; and, where the lab is to have it, a field of ``Fam`` in
``lab/train/algorithms.py``.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from relflat.errors import ArgumentError, ConfigError, DataError, LayerError, RelflatError

P = ParamSpec("P")
T = TypeVar("T")
Curvature = Literal["hessian", "ggn"]
Gradient = Literal["full", "frozen", "weights"]
Reduction = Literal["mean", "sum", "none"]
Number = float | Callable[[int], float]
"""How large the penalty is, or that of each step."""


# -- the checks of all arguments, by their names -------------------------------------------------------------------


class Check(NamedTuple):
    """What an argument of some name must be: in words, and as a test."""

    needed: str
    right: Callable[[Any], bool]
    error: type[RelflatError] = ConfigError


def _number(x: object) -> bool:
    """Whether it is a finite real number, of Python or numpy; ``True`` is none."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def _function(x: object) -> bool:
    """Whether it can be called to compute something; a class would only be built."""
    return callable(x) and not isinstance(x, type)


def _size(x: Any) -> bool:
    """Whether it is a number, one in a tensor, or a function of the step."""
    if _function(x) and not isinstance(x, nn.Module):
        return takes(x, 0)
    return _number(x) or (isinstance(x, Tensor) and x.ndim == 0 and x.dtype != torch.bool and _number(x.item()))


def takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with these, by its signature; True if it has none."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _layers(x: Any) -> bool:
    if isinstance(x, list | tuple | set | frozenset):
        return len(x) > 0 and all(isinstance(one, str | nn.Module | nn.Parameter) for one in x)
    return isinstance(x, str | nn.Module | nn.Parameter)


def _modules(x: Any) -> bool:
    return isinstance(x, nn.Module) or (isinstance(x, list | tuple) and all(map(_modules, x)))


def _device(x: Any) -> bool:
    try:
        torch.empty(0, device=x)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):  # a build without it asserts
        return False
    return not isinstance(x, bool)


def _one_of(choices: Any) -> Check:
    return Check(f"choose one of {list(get_args(choices))}", lambda x: isinstance(x, str) and x in get_args(choices))


def _whole(least: float = -math.inf, needed: str = "a whole number is needed") -> Check:
    return Check(needed, lambda x: isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= least)


def _tensor(needed: str, dims: int = 0) -> Check:
    return Check(needed, lambda x: isinstance(x, Tensor) and x.is_floating_point() and dims in (0, x.ndim), DataError)


_NUMBER = Check("a finite number is needed", _number)
_POSITIVE = Check("a positive number is needed", lambda x: _number(x) and x > 0)
_COUNT = _whole(1, "a whole number from 1 on is needed")
_TRUTH = Check("True or False is needed", lambda x: type(x).__name__ in ("bool", "bool_"))
_FUNCTION = Check("a function is needed (an instance, not a class)", _function)
_REAL = _tensor("a tensor of real numbers is needed")
_ARGUMENTS = {
    "model": Check(
        "the network is needed, a torch.nn.Module and not a criterion: are the two swapped? FAM takes the criterion "
        "first, relative_flatness the model",
        lambda x: isinstance(x, nn.Module) and not isinstance(x, _Loss),
        LayerError,
    ),
    "loss_fn": Check(
        "a criterion is needed, a function of outputs and targets (an instance such as nn.CrossEntropyLoss(), not a "
        "class)",
        _function,
    ),
    "layer": Check(
        "a qualified name, a module or parameter of the model, a glob, 'output', or a list of those is needed",
        _layers,
        LayerError,
    ),
    "curvature": _one_of(Curvature),
    "gradient": _one_of(Gradient),
    "reduction": _one_of(Reduction),
    "method": Check("the name of a method is needed", lambda x: isinstance(x, str)),
    "probes": _whole(1, "at least one product is needed, as a whole number"),
    "radius": _POSITIVE._replace(needed="a positive number is needed, or None for kappa itself"),
    "every": _whole(1, "a number of steps from 1 on is needed"),
    "layers_per_step": _whole(1, "a whole number of layers from 1 on is needed, or None for all"),
    "warmup_steps": _whole(0, "a whole number from 0 on is needed"),
    "strength": Check("a finite number is needed, or a function of the step that gives one", _size),
    "size": Check(
        "a number from 0 on is needed, or a function of the step that gives one",
        lambda x: _size(x) and (callable(x) or bool(x >= 0)),
    ),
    "bound": Check(
        "a positive number is needed, the largest penalty as a share of the loss, or None for no bound",
        lambda x: (_number(x) or (isinstance(x, float) and x == math.inf)) and x > 0,
    ),
    "device": Check("a device that is there is needed, such as 'cpu' or 'cuda:0'", _device),
    "process_group": Check(
        "a process group of torch.distributed is needed, or None",
        lambda x: dist.is_available() and isinstance(x, dist.ProcessGroup),
    ),
    "label_smoothing": Check("a number from 0 to 1 is needed", lambda x: _number(x) and 0 <= x <= 1),
    "factor": _POSITIVE._replace(needed="a positive and finite number is needed, for a negative one changes a ReLU"),
    "delta": _NUMBER,
    "penalty of loss": _tensor("the loss is needed as a tensor with its graph"),
    "W": _tensor("a matrix of real numbers is needed", 2),
    "between": Check("a module or a list of modules is needed", _modules, LayerError),
    "generator": Check("a torch.Generator is needed, or None", lambda x: isinstance(x, torch.Generator)),
    **dict.fromkeys(("rtol", "bandwidth", "low", "high"), _POSITIVE),
    **dict.fromkeys(("seed", "step", "ignore_index"), _whole()),
    **dict.fromkeys(("draws", "max_products", "chunk_tokens", "chunk_classes"), _COUNT),
    **dict.fromkeys(("adaptive", "normalize_features", "measuring", "trace"), _TRUTH),
    **dict.fromkeys(("forward", "output", "loss", "outputs", "loss_of_outputs"), _FUNCTION),
    **dict.fromkeys(("H", "phi", "H_z", "std", "scales", "features", "rotation", "vector", "factors"), _REAL),
}


def check(**arguments: Any) -> None:
    """Refuse the first argument that is not what its name asks for."""
    for name, value in arguments.items():
        if name in _ARGUMENTS and not _ARGUMENTS[name].right(value):
            shown = f"of {type(value).__name__}" if isinstance(value, Tensor | nn.Module) else f"={value!r:.100}"
            raise _ARGUMENTS[name].error(f"{name}{'' if shown[0] == '=' else ' '}{shown}: {_ARGUMENTS[name].needed}")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a function by their names first; None may stand where the signature has it."""
    signature = inspect.signature(function)
    has_none = {n: type(None) in get_args(p.annotation) for n, p in signature.parameters.items()}
    optional = {n for n, p in signature.parameters.items() if p.default is None or has_none[n]}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ArgumentError(f"{function.__qualname__}: {error}; it is {function.__name__}{signature}") from error
        check(**{n: v for n, v in given.items() if v is not None or n not in optional})
        return function(*args, **kwargs)

    return call


# -- the options ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What is estimated and how: options of :class:`relflat.FAM` and :func:`relflat.relative_flatness`, and more.

    Attributes:
        measuring: no graph is built, and no gradient is wanted.
        trace: whether ``Tr H`` is wanted too.

    Raises:
        ConfigError: naming the argument, its value and what it may be.
    """

    curvature: Curvature = "ggn"
    method: str = "auto"
    probes: int = 1
    adaptive: bool = False
    normalize_features: bool = False
    gradient: Gradient = "full"
    radius: float | None = None
    layers_per_step: int | None = None
    _: KW_ONLY
    measuring: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        check(**{name: value for name, (value, default) in given.items() if value is not None or default is not None})
        for problem in self._wrong_together():
            raise ConfigError(problem)

    def __str__(self) -> str:
        """What is not as it is by default, and the curvature, which a finite radius has none of."""
        shown = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        first = ["curvature"] if self.radius is None and "curvature" not in shown else []
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in first + shown)

    @property
    def full(self) -> bool:
        """Whether the curvature itself is differentiated (third derivatives)."""
        return self.gradient == "full" and not self.measuring

    @property
    def constant_features(self) -> bool:
        """Whether no gradient goes through the features."""
        return self.measuring or self.gradient == "weights"

    def _wrong_together(self) -> Iterator[str]:
        if self.method == "xtrace" and not self.measuring:
            yield (
                "method='xtrace' measures over all of the data and has no gradient; use it in relative_flatness, and "
                "'auto' or 'probe' in training"
            )
        if self.method == "xtrace" and (self.probes < 4 or self.probes % 2):
            yield (
                f"probes={self.probes}: XTrace spends products in pairs and needs two pairs for an error; give an "
                "even number from 4 on"
            )
        if self.method == "finite_difference" and self.gradient != "full":
            yield f"gradient={self.gradient!r}: finite differences have the full gradient only"
        if self.method == "finite_difference" and self.curvature != "hessian":
            yield "method='finite_difference' estimates the Hessian: add curvature='hessian'"
        if self.radius is not None:
            yield from self._wrong_with_radius()

    def _wrong_with_radius(self) -> Iterator[str]:
        for name in ("gradient", "method", "layers_per_step"):
            if getattr(self, name) != Options.__dataclass_fields__[name].default:
                yield (
                    f"{name} has no meaning with radius={self.radius}, which moves all layers at once and needs no "
                    "curvature; leave it out"
                )
