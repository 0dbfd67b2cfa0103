"""What integrations share: naming a missing extra, FAM for a loss computed elsewhere, converted batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from relflat.errors import ConfigError, GraphError
from relflat.fam import FAM
from relflat.measure.batches import Batch
from relflat.sizing import BOUND, Sizing


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import a framework in the block; if it is missing, say how to install it.

    Args:
        name: of the extra, and of the integration.

    Raises:
        ImportError: naming the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f'relflat.integrations.{name} needs {error.name}: pip install "relflat[{name}]"', name=error.name
        ) from error


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of FAM with which ``penalty(loss)`` alone is no training.

    Args:
        options: keyword arguments of FAM, the layer among them; none for its defaults.
        where: what the user wrote them in, for messages.

    Raises:
        ConfigError: if the loss of a second forward pass would be needed, or the size of the penalty is not clear.
    """
    Sizing(options, BOUND, None)
    for name, value in options.items():
        if (name, value) == ("method", "finite_difference") or (name == "radius" and value is not None):
            raise ConfigError(
                f"{where}: {name}={value!r} needs the loss of a second forward pass, which the framework computes "
                "out of reach; wrap the criterion instead, FAM(criterion, model, layer, ...), where you call it"
            )


def fam_for_computed_loss(model: nn.Module, options: Mapping[str, Any], where: str) -> FAM:
    """Return a FAM of which only ``penalty(loss)`` is used, as the framework computes the loss.

    Arguments and errors are those of :func:`check_options`, and the network to watch.
    """
    check_options(options, where)
    return FAM(_out_of_reach, model, **options)


def _out_of_reach(*args: Any) -> NoReturn:
    raise GraphError("here the framework computes the loss: use criterion.penalty(loss)")


class Converted:
    """Batches, each converted as a framework does it; can be gone over as often as the batches."""

    def __init__(self, data: Iterable[Batch], convert: Callable[[Batch], Batch]) -> None:
        self.data, self.convert = data, convert

    def __iter__(self) -> Iterator[Batch]:
        return map(self.convert, self.data)


def converted(data: Any, convert: Callable[[Batch], Batch]) -> Any:
    """Data with their batches converted: one batch, batches, or an iterator."""
    if isinstance(data, tuple | Mapping):
        return convert(data)
    return map(convert, data) if isinstance(data, Iterator) else Converted(data, convert)
