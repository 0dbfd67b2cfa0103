"""A model of the user's own, from ``path/to/file.py:make``, measured at one checkpoint or swept over several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from relflat import relative_flatness_by_layer
from relflat.cli.checkpoints import load_into
from relflat.cli.console import watching
from relflat.errors import ConfigError, DataError
from relflat.lab.common.names import look_up, names_in
from relflat.lab.tasks.own import blamed, digest_of, module_of, split_name
from relflat.plot.shown import ByLayer


class Made(NamedTuple):
    """What the user's function returns."""

    model: nn.Module
    loss: Callable[..., Any]
    data: Any


def make_of(name: str) -> Made:
    """What the function of this name returns.

    Raises:
        ConfigError: there is no such file or function, or it returns something else.
    """
    place = split_name(name)
    if place is None or not place[1]:
        raise ConfigError(f"{name} is a file; name the function in it that returns (model, loss, data): {name}:make")
    path, function = place
    if not path.is_file():
        raise ConfigError(f"Cannot read {path}: no such file. Check the path.")
    with blamed(name):
        make = _function_of(module_of(path, digest_of(path)), function, path.name)
        _must_need_nothing(name, make)
        made = make()
    told = f"{name} must return (model, loss, data)"
    if not isinstance(made, tuple | list) or len(made) != 3:
        length = f" of length {len(made)}" if isinstance(made, tuple | list) else ""
        raise ConfigError(f"{told}, and it returned {type(made).__name__}{length}")
    found = Made(*made)
    if not isinstance(found.model, nn.Module):
        raise ConfigError(f"{told}: the first is {type(found.model).__name__}, not a torch.nn.Module")
    if not callable(found.loss):
        raise ConfigError(f"{told}: the second is {type(found.loss).__name__}, not a function of outputs and targets")
    return found


def _function_of(module: ModuleType, name: str, file: str) -> Callable[..., Any]:
    """The function of a name, imported ones too; where there is none, those defined in the file are listed."""
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    own = {key: value for key, value in functions.items() if value.__module__ == module.__name__}
    return functions[name] if name in functions else look_up(f"function in {file}", name, own)


def _must_need_nothing(name: str, make: Callable[..., Any]) -> None:
    needed = [n for n, p in signature(make).parameters.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    if needed:
        raise ConfigError(f"{name} is called without arguments, and it needs {', '.join(needed)}")


def measure_own(
    name: str, checkpoints: Sequence[Path], layer: str | None, *, unsafe: bool, **options: Any
) -> dict[str, ByLayer]:
    """Kappa of layers at each checkpoint, by its name; as the function made the model where there is none.

    Options are those of `relflat.relative_flatness_by_layer`.

    Raises:
        DataError: a checkpoint is not there or not the model's, or the data can be gone over only once.
    """
    made = make_of(name)
    if isinstance(made.data, Iterator) and len(checkpoints) > 1:
        raise DataError(f"{name} returns an iterator as data, which one checkpoint uses up; return a list or loader")
    found = {}
    with watching() as watched:
        for number, path in enumerate(checkpoints or [None], 1):
            if path is not None:
                load_into(made.model, path, unsafe=unsafe)
            data = watched(made.data, f" {path.name} ({number} of {len(checkpoints)})" if path else "")
            with blamed(name):
                flats = relative_flatness_by_layer(
                    made.model, made.loss, data, layer=names_in(layer or "output"), **options
                )
            found["" if path is None else str(path)] = flats
    return shortened(found)


def shortened(found: Mapping[str, ByLayer]) -> dict[str, ByLayer]:
    """By the names of the files alone, where no two have the same."""
    names = [Path(path).name for path in found]
    return dict(zip(names, found.values(), strict=True)) if len(set(names)) == len(names) else dict(found)


def sweep_table(found: Mapping[str, ByLayer]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row for each checkpoint, or for each layer, whichever are more."""
    layers = list(dict.fromkeys(name for flats in found.values() for name in flats))
    cells = {
        title: [*(str_of(flats, name) for name in layers), f"{flats.total:.5g}", f"{_any(flats).loss:.5g}"]
        for title, flats in found.items()
    }
    heads = [*layers, "sum", "loss"]
    if len(found) >= len(layers):
        return ["checkpoint", *heads], [[title, *row] for title, row in cells.items()]
    return ["layer", *cells], [[head, *(row[i] for row in cells.values())] for i, head in enumerate(heads)]


def str_of(flats: ByLayer, layer: str) -> str:
    """Kappa of a layer with its error; "-" where it took no part."""
    if layer not in flats:
        return "-"
    flat = flats[layer]
    return f"{flat.value:.5g}" + (f" ± {flat.stderr:.2g}" if flat.stderr else "")


def _any(flats: ByLayer) -> Any:
    return next(iter(flats.values()))
