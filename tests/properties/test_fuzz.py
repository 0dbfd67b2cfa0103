"""No malformed argument is taken, and none ends in a bare error: every public call refuses with an error of its own.

A table of malformed values for each kind of argument, tried one by one in every argument of that kind of every public
callable, beside right values for the others; then pairs of them, drawn at random.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relflat
from relflat import FAM, RelflatError, reference, reparam

CE = nn.CrossEntropyLoss
torch.manual_seed(0)
X, Y = torch.randn(6, 4), torch.randint(3, (6,))
NAN, INF = math.nan, math.inf


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Empty:
    """An object of no meaning."""


def _nothing() -> None:
    """A function of nothing."""


# -- malformed values of each kind --------------------------------------------------------------------------------

_NO_NUMBER: list[Any] = [
    *("1", "nan", "", b"1", NAN, INF, -INF, True, False, 1j, [1], (1,), {}, {1}, Empty(), Empty, print),
    *(torch.ones(2), torch.tensor(True), np.ones(2), np.nan, np.bool_(True), nn.Linear, nn.Linear(1, 1)),
]
_NO_TENSOR: list[Any] = [None, 1.0, "x", [1.0], np.ones(4), Empty(), nn.Linear(1, 1), Y > 0, torch.ones(4, 4).long()]
BAD: dict[str, list[Any]] = {
    "positive": [*_NO_NUMBER, 0, -1, -0.5],
    "number": _NO_NUMBER,
    "strength": [x for x in _NO_NUMBER if x is not print and not isinstance(x, nn.Module)]
    + [lambda step: None, lambda step: "1", _nothing],
    "bound": [x for x in _NO_NUMBER if x is not INF] + [0, -1, -0.5],
    "whole": [*_NO_NUMBER, 1.5, np.float64(1.5)],
    "count": [*_NO_NUMBER, 1.5, 1.0, 0, -1, np.float64(2.0), np.int64(0)],
    "truth": ["True", "False", "", 0, 1, 1.0, NAN, [], [True], {}, Empty(), torch.tensor(True), print, nn.Linear],
    "choice": ["", "Hessian", " ggn", "FULL", b"ggn", 0, 1, True, NAN, ["ggn"], ("full",), {}, Empty(), print, torch],
    "function": ["f", "", 0, 1.5, True, NAN, [], {}, Empty(), Empty, nn.CrossEntropyLoss, nn.Linear, X],
    "model": [None, "model", 0, NAN, True, [], {}, Empty(), nn.Linear, print, lambda x: x, X, CE(), CE, nn.MSELoss()],
    "layer": [
        *(0, 2, 1.5, NAN, True, b"0", [], (), {}, [2], [None], ["0", 1], [[]], Empty(), print, nn.Linear, X),
        *("nope", "outputs", "0.", "7*", ["0", "nope"], nn.Linear(2, 2), nn.Parameter(X)),
    ],
    "device": ["nonsense", "", "gpu:x", -1, 1.5, NAN, True, [], {}, Empty(), print, nn.Linear, X, "cuda:999"],
    "group": ["world", 0, True, NAN, [], {}, Empty(), print, nn.Linear, X],
    "data": [
        *(None, 0, NAN, True, "data", b"data", Empty(), print, nn.Linear, nn.Linear(1, 1), X, [], (), {}, iter([])),
        *([X], (X,), (X, Y, Y), [X, Y], ("a", "b"), (None, Y), (X, None), (1, 2), (X, "y"), (X, 0), (X, Y + 9)),
        *((X.numpy(), Y), (X.tolist(), Y), (X, Y.numpy()), (X, Y.tolist()), (X[:, :2], Y), (X, Y[:3])),
        *(
            (X.long(), Y),
            (X * NAN, Y),
            (X[:0], Y[:0]),
            (X, torch.full((6,), -100)),
            {"x": X},
            {"labels": Y},
            {"x": Y},
        ),
        *([(X, Y), None], [(X, Y), (X, "y")], [None], [[]], [{}], [1, 2], (Empty(), Y), {1: X, "labels": Y}),
    ],
    "tensor": _NO_TENSOR,
    "targets": [None, 1, "y", [0, 1], np.ones(6, int), Empty(), Y.float(), Y[:3], Y + 9, Y - 9, X],
    "matrix": [*_NO_TENSOR, X[0], torch.ones(2, 2, 2), X.to(torch.complex64)],
}
BAD["a strength"], BAD["size"] = [*BAD["strength"], None], [*BAD["strength"], -1, lambda step: -1.0]
_FORWARD = [_nothing, lambda model: (X, Y), lambda model, batch: None, lambda model, batch: (model(X),)]
BAD["forward"] = [*BAD["function"], *_FORWARD, lambda model, batch: (None, Y), lambda model, batch: 3]

_MEASURING = {"model": "model", "loss_fn": "function", "data": "data", "layer": "layer", "device": "device"}
_MEASURING |= {"forward": "forward", "seed": "whole"}
_PROBING = {"curvature": "choice", "method": "choice", "probes": "count", "adaptive": "truth"}


def _step(**given: Any) -> Any:
    """Build the criterion and train for a step, as some options show only there."""
    model = given["model"]
    with FAM(**given) as criterion:
        return criterion(model(X), Y)


def _set_strength(strength: Any) -> Any:
    model = net()
    with FAM(CE(), model, "0", strength=0.1) as criterion:
        criterion.strength = strength
        return criterion(model(X), Y)


def _penalty(loss: Any) -> Any:
    model = net()
    with FAM(CE(), model, "0", strength=0.1) as criterion:
        return criterion.penalty(loss)


def _measured() -> dict[str, Any]:
    return {"model": net(), "loss_fn": CE(), "data": (X, Y), "layer": "0"}


W, PHI = torch.randn(3, 4), torch.randn(5, 4)
Call = tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, str]]
_FLAT = {**_MEASURING, **_PROBING, "rtol": "positive", "normalize_features": "truth", "process_group": "group"}
_OF_LOSS = {"loss": "function", "W": "matrix"}
CALLS: dict[str, Call] = {
    "relative_flatness": (relflat.relative_flatness, _measured, _FLAT),
    "relative_flatness_by_layer": (relflat.relative_flatness_by_layer, _measured, _FLAT),
    "per_sample_flatness": (relflat.per_sample_flatness, _measured, {**_MEASURING, **_PROBING}),
    "max_eigenvalue_flatness": (
        relflat.max_eigenvalue_flatness,
        _measured,
        {**_MEASURING, "rtol": "positive", "max_products": "count"},
    ),
    "feature_robustness": (
        relflat.feature_robustness,
        lambda: _measured() | {"radius": 0.1},
        {**_MEASURING, "radius": "positive", "draws": "count"},
    ),
    "representativeness": (
        relflat.representativeness,
        lambda: {"model": net(), "loss_fn": CE(), "train": (X, Y), "test": (X, Y), "layer": "0"},
        {**{k: v for k, v in _MEASURING.items() if k != "data"}, "train": "data", "test": "data", "draws": "count"}
        | {"bandwidth": "positive"},
    ),
    "FAM": (
        _step,
        lambda: {"loss_fn": CE(), "model": net(), "layer": "0", "strength": 0.1},
        {
            "loss_fn": "function",
            "model": "model",
            "layer": "layer",
            "strength": "strength",
            "bound": "bound",
            "radius": "positive",
            **_PROBING,
            "gradient": "choice",
            "every": "count",
            "layers_per_step": "count",
            "normalize_features": "truth",
            "seed": "whole",
            "warmup_steps": "whole",
        },
    ),
    "FAM of a size": (_step, lambda: {"loss_fn": CE(), "model": net()}, {"size": "size"}),
    "FAM.strength": (_set_strength, lambda: {"strength": 0.2}, {"strength": "a strength"}),
    "FAM.penalty": (_penalty, lambda: {"loss": X.sum()}, {"loss": "function"}),
    "linear_cross_entropy_fam": (
        relflat.linear_cross_entropy_fam,
        lambda: {"features": X, "weight": torch.randn(3, 4), "targets": Y, "strength": 0.1},
        {
            "features": "tensor",
            "weight": "matrix",
            "targets": "targets",
            "strength": "number",
            "bias": "tensor",
            "reduction": "choice",
            "gradient": "choice",
            "label_smoothing": "number",
            "ignore_index": "whole",
            "probes": "count",
            "seed": "whole",
            "step": "whole",
            "chunk_tokens": "count",
            "chunk_classes": "count",
        },
    ),
    "at_layer": (
        reference.at_layer,
        lambda: {"model": net(), "loss_fn": CE(), "inputs": X, "targets": Y, "layer": "0"},
        {"model": "model", "loss_fn": "function", "layer": "layer"},
    ),
    "outputs_at_layer": (
        reference.outputs_at_layer,
        lambda: {"model": net(), "inputs": X, "layer": "0"},
        {"model": "model", "layer": "layer"},
    ),
    **{
        name: (getattr(reference, name), lambda: {"loss": lambda W: (W**2).sum(), "W": W}, _OF_LOSS)
        for name in ("kappa", "kappa_adaptive", "layer_hessian", "trace", "layerwise", "max_eigenvalue")
    },
    "kappa_normalized": (
        reference.kappa_normalized,
        lambda: {"loss": lambda W: (W**2).sum(), "W": W, "std": torch.ones(4)},
        {**_OF_LOSS, "std": "tensor"},
    ),
    "reference.feature_robustness": (
        reference.feature_robustness,
        lambda: {"loss": lambda W: (W**2).sum(), "W": W, "matrices": [torch.eye(4)], "delta": 0.1},
        {**_OF_LOSS, "delta": "number"},
    ),
    "kappa_ggn": (
        reference.kappa_ggn,
        lambda: {"outputs": lambda W: W @ PHI.T, "loss_of_outputs": lambda z: (z**2).sum(), "W": W},
        {"outputs": "function", "loss_of_outputs": "function", "W": "matrix"},
    ),
    "kappa_of_hessian": (
        reference.kappa_of_hessian,
        lambda: {"W": W, "H": torch.randn(3, 4, 3, 4)},
        {"W": "matrix", "H": "matrix"},
    ),
    "kappa_in_output_space": (
        reference.kappa_in_output_space,
        lambda: {"W": W, "phi": PHI, "H_z": torch.randn(15, 15)},
        {"W": "matrix", "phi": "tensor", "H_z": "tensor"},
    ),
    "rescale_layer": (
        reparam.rescale_layer,
        lambda: {"first": nn.Linear(3, 4), "between": nn.ReLU(), "second": nn.Linear(4, 2), "factor": 2.0},
        {"first": "model", "between": "model", "second": "model", "factor": "positive"},
    ),
    "rescale_neurons": (
        reparam.rescale_neurons,
        lambda: {"first": nn.Linear(3, 4), "between": [], "second": nn.Linear(4, 2), "factors": torch.ones(4)},
        {"first": "model", "second": "model", "factors": "tensor"},
    ),
    "random_rescaling": (
        reparam.random_rescaling,
        lambda: {"model": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))},
        {"model": "model", "low": "positive", "high": "positive", "generator": "group"},
    ),
    **{
        name: (
            getattr(reparam, name),
            lambda of=of: {"layer": nn.Linear(4, 3), **of},
            {"layer": "model", of_name: "tensor"},
        )
        for name, of_name, of in (
            ("rescale_features", "scales", {"scales": torch.ones(4)}),
            ("normalize_features", "features", {"features": PHI}),
            ("rotate_features", "rotation", {"rotation": torch.eye(4)}),
        )
    },
    "shift_rows": (
        reparam.shift_rows,
        lambda: {"layer": nn.Linear(4, 3), "vector": torch.ones(4), "head": CE()},
        {"layer": "model", "vector": "tensor", "head": "function"},
    ),
}


def malformed(name: str) -> Iterator[dict[str, Any]]:
    """An argument of a callable that is malformed, each in turn; then one that is unknown."""
    for argument, kind in CALLS[name][2].items():
        for value in BAD[kind]:
            if not _right_after_all(name, argument, value):
                yield {argument: value}
    if not name.startswith("FAM."):
        yield {"unknown": 1}


def _right_after_all(name: str, argument: str, value: Any) -> bool:
    """A value that is malformed for other arguments of its kind."""
    tensor = isinstance(value, Tensor)
    if argument == "label_smoothing":
        return type(value) in (int, float) and value in (0, 1)
    return (
        (argument in ("loss_fn", "head") and isinstance(value, nn.Module))
        or (argument == "head" and value is CE)
        or (argument == "between" and value == [])
        or (argument == "bias" and value is None)
        or (argument == "H_z" and tensor and value.ndim == 4)
    )


def refused(name: str, given: dict[str, Any]) -> str | None:
    """What is wrong with the way in which a call with right arguments but for these was refused; None if nothing."""
    call, right, _ = CALLS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call(**(right() | given))
    except RelflatError as error:
        return None if len(str(error)) > 15 else f"says only {error}"
    except Exception as error:  # whatever else it is, it is a bare one
        return f"{type(error).__name__}: {error}"
    return f"was taken: {str(result)[:80]}"


@pytest.mark.parametrize("name", CALLS)
def test_right_arguments_are_taken(name: str) -> None:
    call, right, _ = CALLS[name]
    if name != "FAM.penalty":
        call(**right())


def _shown(given: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r:.60}" for k, v in given.items())


@pytest.mark.parametrize("name", CALLS)
def test_a_malformed_argument_is_refused(name: str) -> None:
    wrong = [(f"{given}", said) for given in malformed(name) if (said := refused(name, given)) is not None]
    assert not wrong, f"{len(wrong)} of {name}:\n" + "\n".join(f"{a[:300]} -> {b[:200]}" for a, b in wrong[:20])


def test_two_malformed_arguments_are_refused_and_there_are_1500_calls_in_all() -> None:
    one_by_one = {name: list(malformed(name)) for name in CALLS}
    draw, wrong, count = random.Random(0), [], sum(map(len, one_by_one.values()))
    for _ in range(300):
        name = draw.choice(list(CALLS))
        one, two = draw.choice(one_by_one[name]), draw.choice(one_by_one[name])
        right = CALLS[name][1]().keys()
        given = one | {k: v for k, v in two.items() if k not in right}
        count += 1
        if (said := refused(name, given)) is not None:
            wrong.append(f"{name}({_shown(given)}) -> {said[:200]}")
    assert not wrong, "\n".join(wrong[:20])
    assert count >= 1500
