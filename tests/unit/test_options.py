"""Arguments are checked by their names; options that mean nothing together are refused."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from small import mlp
from torch import nn

from relflat import FAM, ConfigError, RelflatError
from relflat.errors import ArgumentError
from relflat.options import Options, check, checked, takes
from relflat.sizing import Sizing

CE = nn.CrossEntropyLoss


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0.1, "gradient": "weights"},
        {"radius": 0.1, "layers_per_step": 1},
        {"radius": 0.1, "method": "closed_form"},
        {"method": "finite_difference", "curvature": "hessian", "gradient": "weights"},
    ],
)
def test_options_without_meaning_are_refused(options) -> None:
    with pytest.raises(ConfigError, match=r"no meaning|full gradient only"):
        FAM(CE(), mlp(), "output", strength=1.0, **options)


# by the name of the argument: what it may be, and what it may not
ARGUMENTS = {
    "model": ([nn.Linear(1, 1)], [CE(), nn.Linear, "net", None]),
    "loss_fn": ([CE(), nn.functional.cross_entropy], [CE, 3, None]),
    "layer": (["0", nn.Linear(1, 1), nn.Parameter(torch.ones(2)), ["0"], {"0"}], [[], 0, [0], ["0", 1], None]),
    "between": ([nn.ReLU(), [nn.ReLU(), [nn.ReLU()]]], ["relu", [nn.ReLU(), 1]]),
    "curvature": (["ggn", "hessian"], ["fisher", 1]),
    "probes": ([1, 7], [0, -1, 1.0, True, "1", math.nan]),
    "every": ([1], [0, 1.5]),
    "layers_per_step": ([1], [0]),
    "warmup_steps": ([0, 3], [-1]),
    "seed": ([-1, 0, 2**40], [0.5, True, "0"]),
    "draws": ([1], [0]),
    "radius": ([0.1, 5], [0, -1, math.inf, math.nan, True]),
    "delta": ([0, -1.5], [math.inf, "0"]),
    "rtol": ([1e-3], [0, -1e-3]),
    "label_smoothing": ([0, 0.5, 1], [-0.1, 1.1, True, "0.1", math.nan]),
    "adaptive": ([True, False], [1, 0, "True"]),
    "strength": (
        [0, -1.0, torch.tensor(1.0), torch.tensor(2), lambda step: 1.0],
        [torch.ones(1), torch.tensor(True), torch.tensor(math.nan), lambda: 1.0, nn.Linear(1, 1), "1", True, float],
    ),
    "device": (["cpu", torch.device("cpu")], ["nowhere", "xla:7", True, 1.5]),
    "process_group": ([], [1, "gloo"]),
    "generator": ([torch.Generator()], [0]),
    "W": ([torch.ones(2, 3)], [torch.ones(2), torch.ones(2, 3, dtype=torch.long), [[1.0]]]),
    "phi": ([torch.ones(2), torch.ones(2, 3)], [torch.ones(2, dtype=torch.long), 1.0]),
    "an unknown name": ([None, object()], []),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_what_their_names_ask_for(name: str) -> None:
    right, wrong = ARGUMENTS[name]
    for value in right:
        check(**{name: value})
    for value in wrong:
        with pytest.raises(RelflatError, match=rf"^{name}(=| of )"):
            check(**{name: value})


def test_a_checked_function_takes_none_where_its_signature_has_it() -> None:
    @checked
    def given(probes: int, radius: float | None, seed: int = None, every: int = 2) -> tuple:  # type: ignore[assignment]  # noqa: RUF013
        return probes, radius, seed, every

    assert given(1, None) == (1, None, None, 2)
    assert given(3, 0.5, seed=None, every=4) == (3, 0.5, None, 4)
    for wrong in ((None, None), (1, -1), (1, None, 0.5), (1, None, None, None)):
        with pytest.raises(ConfigError, match=r"^(probes|radius|seed|every)="):
            given(*wrong)
    for call in (lambda: given(1), lambda: given(1, None, number=2)):
        with pytest.raises(ArgumentError, match=r"given: (missing|got).*number|given: missing.*it is given\(probes"):
            call()


def test_whether_a_function_takes_arguments() -> None:
    assert takes(lambda a, b=1: a, 1)
    assert takes(lambda *, a: a, a=1)
    assert not takes(lambda a: a)
    assert not takes(lambda: 0, 1)
    assert takes(min, 1, 2)  # has no signature


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, "curvature='ggn'"),
        ({"probes": 2}, "curvature='ggn', probes=2"),
        ({"curvature": "hessian", "probes": 3}, "curvature='hessian', probes=3"),
        ({"radius": 0.1, "adaptive": True}, "adaptive=True, radius=0.1"),
    ],
)
def test_options_show_what_is_not_as_by_default(given, shown: str) -> None:
    assert str(Options(**given)) == shown


@pytest.mark.parametrize(
    ("gradient", "measuring", "full", "constant"),
    [
        ("full", False, True, False),
        ("full", True, False, True),
        ("frozen", False, False, False),
        ("weights", False, False, True),
        ("weights", True, False, True),
    ],
)
def test_what_is_differentiated(gradient, measuring: bool, full: bool, constant: bool) -> None:
    options = Options(gradient=gradient, measuring=measuring)
    assert (options.full, options.constant_features) == (full, constant)


@pytest.mark.parametrize(("probes", "right"), [(2, False), (3, False), (4, True), (5, False), (6, True)])
def test_xtrace_spends_products_in_pairs(probes: int, right: bool) -> None:
    if right:
        assert Options(method="xtrace", probes=probes, measuring=True).probes == probes
        return
    with pytest.raises(ConfigError, match=f"^probes={probes}: XTrace"):
        Options(method="xtrace", probes=probes, measuring=True)


def of(strength, **options) -> Sizing:
    return Sizing({"layer": "0", "strength": strength}, None, None, **options)


def test_strength_of_a_step() -> None:
    assert of(0.5).strength_at(7, 3) == 0.5
    assert of(lambda step: step / 2).strength_at(7, 3) == 3.5
    for wrong in (math.inf, "1", None, lambda step: 1.0):
        later = of(lambda step, wrong=wrong: wrong if step else 1.0)
        with pytest.raises(ConfigError, match=r"at step 7.*a finite number is needed"):
            later.strength_at(7, 3)


def test_warmup_rises_in_even_steps_to_the_strength() -> None:
    with pytest.warns(DeprecationWarning, match=r"strength=lambda step: 2.0 \* min\(1, \(step \+ 1\) / 4\)"):
        sizing = of(2.0, warmup_steps=3)
    assert [sizing.strength_at(step, 3) for step in (0, 1, 2, 3, 4, 100)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    with pytest.raises(ConfigError, match="as a function of the step"):
        of(lambda step: 1.0, warmup_steps=3)


def test_options_are_settled_once_and_for_all() -> None:
    """What was decided from them would not be decided again."""
    with pytest.raises(FrozenInstanceError):
        FAM(nn.CrossEntropyLoss(), nn.Linear(2, 2)).options.probes = 3
