"""Weights from files, put into a network that is there: nothing in a file is run unless its reader trusts it."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relflat.errors import DataError

WITHIN = ("state_dict", "model_state_dict", "model", "module", "weights", "params")  # where trainers keep the weights
SHOWN = 4  # of many names


def load_into(model: nn.Module, path: Path, *, unsafe: bool) -> None:
    """Give a network the weights of a file; names may have something in front, as wrappers put it there.

    Raises:
        DataError: the file is not there, holds no weights, would run code, or its weights are not the network's.
    """
    own, found = model.state_dict(), weights_in(read(path, unsafe=unsafe), path)
    front = _front(own, found)
    weights = {name.removeprefix(front): value for name, value in found.items() if name.startswith(front)}
    _must_have_names(path, [n for n in own if n not in weights], [n for n in weights if n not in own])
    for name, value in weights.items():
        here, there = tuple(getattr(own[name], "shape", ())), tuple(getattr(value, "shape", ()))
        if there != here:
            raise DataError(f"{path} does not fit the model: {name!r} is {there} in it and {here} in the model")
    model.load_state_dict(weights)


def _must_have_names(path: Path, missing: list[str], others: list[str]) -> None:
    told = [f"{_some(missing)} of the model are missing in it"] if missing else []
    told += [f"{_some(others)} in it are not in the model"] if others else []
    if told:
        raise DataError(f"{path} does not fit the model: {'; '.join(told)}")


def read(path: Path, *, unsafe: bool) -> Any:
    """What a file holds: safetensors by its ending, else what `torch.save` wrote."""
    must_be_there(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise DataError(f"Cannot read the checkpoint {path}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of what it then cannot read
            return torch.load(path, map_location="cpu", weights_only=not unsafe)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        if "global" in str(error).lower() and not unsafe:  # the name of a class or function
            raise DataError(
                f"{path} holds more than tensors, and to read such a file is to run the code in it. Save the "
                "state_dict alone, or as safetensors; if you trust whoever made the file, add --unsafe"
            ) from error
        raise DataError(
            f"{path} is no checkpoint that torch.load can read: it was cut short, or is of another kind"
        ) from error


def must_be_there(path: Path) -> None:
    """Refuse what is no file."""
    if not path.is_file():
        what = "it is a folder; name the file of weights in it" if path.is_dir() else "no such file; check the path"
        raise DataError(f"Cannot read the checkpoint {path}: {what}")


def weights_in(found: Any, path: Path) -> dict[str, Any]:
    """The names and weights in what a file held, wherever trainers put them."""
    if isinstance(found, nn.Module):
        return dict(found.state_dict())
    if isinstance(found, Mapping):
        if any(isinstance(value, Tensor) for value in found.values()):
            return dict(found)
        for key in WITHIN:
            if isinstance(found.get(key), Mapping | nn.Module):
                return weights_in(found[key], path)
    what = (
        f"a mapping of {_some([str(key) for key in found])}" if isinstance(found, Mapping) else type(found).__name__
    )
    raise DataError(f"{path} holds no weights by name, but {what}; save model.state_dict()")


def _front(own: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What stands before the model's names in a file; "" where they stand as they are, or nothing fits."""
    first = next(iter(own), "")
    fronts = [name.removesuffix(first) for name in found if name.endswith(f".{first}")]
    fits = [front for front in fronts if all(front + name in found for name in own)]
    return fits[0] if fits and first not in found else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
