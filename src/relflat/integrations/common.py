"""What the integrations share: naming a missing extra, FAM for a loss computed elsewhere, results as metrics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError, GraphError
from relflat.fam import FAM
from relflat.result import Flatness


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


def fam_for_computed_loss(model: nn.Module, layer: Layer, options: Mapping[str, Any], where: str) -> FAM:
    """Return a FAM of which only ``penalty(loss)`` is used, as the framework computes the loss.

    Args:
        model: the network to watch.
        layer: as for FAM.
        options: keyword arguments of FAM.
        where: what the user wrote them in, for messages.

    Raises:
        ConfigError: see :func:`check_options`.
    """
    check_options(options, where)
    return FAM(_out_of_reach, model, layer, **options)


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of FAM that ``penalty(loss)`` cannot honour.

    Raises:
        ConfigError: if they need the loss of a second forward pass.
    """
    for name, value in options.items():
        if (name, value) == ("method", "finite_difference") or (name == "radius" and value is not None):
            raise ConfigError(
                f"{where}: {name}={value!r} needs the loss of a second forward pass, which the framework computes "
                "out of reach; wrap the criterion instead, FAM(criterion, model, layer, ...), where you call it"
            )


def _out_of_reach(*args: Any) -> NoReturn:
    raise GraphError("here the framework computes the loss: use criterion.penalty(loss)")


def metrics(by_layer: Mapping[str, Flatness]) -> dict[str, float]:
    """Measured values by name, kappa never alone: with its error, and the loss and confidence it depends on."""
    found: dict[str, float] = {}
    for layer, flat in by_layer.items():
        found[f"flatness/{layer}"] = flat.value
        found[f"flatness/{layer}/weight_norm"] = flat.weight_norm
        if flat.stderr:
            found[f"flatness/{layer}/stderr"] = flat.stderr
        found["flatness/loss"] = flat.loss
        if flat.confidence is not None:
            found["flatness/confidence"] = flat.confidence
    return found


def check_every(every: int) -> None:
    """Refuse to measure every zeroth epoch."""
    if every < 1:
        raise ConfigError(f"every={every}: measure every so many epochs, at least 1")
