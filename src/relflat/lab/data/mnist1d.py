"""MNIST-1D (Greydanus and Kobak 2020): 4,000 + 1,000 synthetic signals of length 40, made by the package's own code.

The package's modules import ``requests`` and matplotlib for what is not needed here, so only the functions of
``data.py`` are run, beside the untouched ``transform.py``. It draws from NumPy's global generator, which is put back.
"""

import ast
from collections import OrderedDict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from relflat.errors import DataError
from relflat.lab.data.arrays import Arrays, RawData
from relflat.lab.data.fetch import files


def read() -> RawData:
    """The data set as its authors make it by default (their seed 42): inputs (n, 1, 40) of mean 0 and deviation 1.

    Raises:
        DataError: the package was not fetched or is damaged.
    """
    folder = files("mnist1d")
    try:
        made = generate(folder)
    except (OSError, KeyError, SyntaxError) as error:
        raise DataError(f"{folder} cannot be run: {error!r}. Delete it and get 'mnist1d' again.") from error

    def part(end: str) -> Arrays:
        signals = torch.from_numpy(made[f"x{end}"]).float().unsqueeze(1)
        return Arrays(signals, torch.from_numpy(made[f"y{end}"]).long())

    return RawData(part(""), part("_test"), 10)


def signal_cnn(num_classes: int = 10) -> nn.Sequential:
    """Three strided convolutions of width 5 (32, 64, 64) with BatchNorm, kept in place (no pooling), and output."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = 1
    for number, size in enumerate((32, 64, 64), 1):
        layers[f"conv{number}"] = nn.Conv1d(width, size, 5, stride=2, padding=2, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm1d(size)
        layers[f"relu{number}"] = nn.ReLU()
        width = size
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(width * 5, num_classes)
    return nn.Sequential(layers)


def generate(folder: Path) -> dict[str, Any]:
    """Run the package's ``make_dataset`` with its default arguments; NumPy's global generator is put back."""
    functions = functions_of(folder / "data.py")
    functions |= {
        "np": np,
        "transform": module(folder / "transform.py").transform,
        "set_seed": np.random.seed,
        "ObjectView": lambda values: SimpleNamespace(**values),
    }
    state = np.random.get_state()
    try:
        made: dict[str, Any] = functions["make_dataset"](functions["get_dataset_args"]())
    finally:
        np.random.set_state(state)
    return made


def functions_of(path: Path) -> dict[str, Any]:
    """The functions that a file defines, without running its imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    found: dict[str, Any] = {}
    exec(compile(tree, str(path), "exec"), found)
    return found


def module(path: Path) -> Any:
    """A file as a module of its own, not registered anywhere."""
    spec = spec_from_file_location(f"_relflat_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
