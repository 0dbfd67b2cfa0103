import copy
from dataclasses import replace

import pytest
import torch

from relflat.lab.tasks.models import mlp
from relflat.papers import invariance
from relflat.papers.invariance import CASES, CHANGES, HIGH, LOW, SAME, SIZES, Size, recipes, rescale_neurons
from relflat.papers.measures import MEASURES
from relflat.papers.trained import Source


@pytest.fixture
def tiny(monkeypatch):
    """One small network of digits, measured on few samples."""
    recipe = replace(recipes("small")[0], source=Source("digits", 200, held_out=100), level=0.3)
    monkeypatch.setattr(invariance, "recipes", lambda scale: [recipe])
    monkeypatch.setitem(SIZES, "small", Size("fc4", 60))
    return recipe


def test_a_tiny_study(reproduced, tiny, tmp_path):
    values = reproduced("invariance", "--out", "out")
    found = values["data"]["changes"]
    assert values["data"]["moved"] < 1e-9
    assert set(found) == set(CASES)
    assert all(set(each) == set(MEASURES) for each in found.values())
    for name, case in CASES.items():
        for measure in MEASURES:
            if case.answer(measure) == "same":
                assert found[name][measure] <= SAME, (name, measure)
            elif case.answer(measure) == "changes":
                assert found[name][measure] > SAME, (name, measure)
    pairs = sum(case.answer(measure) != "draws" for case in CASES.values() for measure in MEASURES)
    assert values["findings"][0].startswith(f"{pairs} of {pairs} pairs")
    kept = list((tmp_path / "runs" / "invariance").glob("*-fc4-60.json"))
    time = kept[0].stat().st_mtime_ns
    assert reproduced("invariance", "--out", "out")["data"] == values["data"]
    assert kept[0].stat().st_mtime_ns == time


def test_a_measure_that_errs_is_reported(reproduced, tiny, monkeypatch):
    """A wrong kappa, Tr H in its place, must be told from an invariant one."""
    wrong = replace(MEASURES["kappa"], of=MEASURES["trace"].of)
    few = ("trace", "lambda_max", "weight_norm", "pac_bayes", "sam")  # those that the findings name
    monkeypatch.setattr(invariance, "MEASURES", {"kappa": wrong, **{name: MEASURES[name] for name in few}})
    values = reproduced("invariance")
    assert "not so: kappa, layers, at the output" in values["findings"][0]
    assert "changes (theory: same)" in values["tables"][0]["rows"][0]


@pytest.mark.parametrize("name", CASES)
def test_every_change_keeps_the_function(name):
    case = CASES[name]
    net = mlp(6, (5, 5, 5, 5), num_classes=3).double()
    changed = copy.deepcopy(net)
    layer = CHANGES[case.change](changed, "fc4" if case.hidden else "output", torch.Generator().manual_seed(0))
    x = torch.randn(20, 6, dtype=torch.float64)
    assert torch.allclose(changed(x).softmax(1), net(x).softmax(1), atol=1e-12)
    before = net.get_submodule("fc4" if case.hidden else "output").weight
    assert not torch.allclose(changed.get_submodule(layer).weight, before, rtol=0.1)


def test_factors_are_those_of_the_paper():
    assert (LOW, HIGH) == (5.0, 25.0)
    net = mlp(6, (5, 5), num_classes=3).double()
    before = net.get_submodule("fc1").weight.clone()
    rescale_neurons(net, "fc1", torch.Generator().manual_seed(0))
    ratio = (net.get_submodule("fc1").weight / before)[:, 0]
    assert bool(((ratio >= 5) & (ratio <= 25)).all())
    assert ratio.std() > 0.1


def test_the_papers_networks():
    networks = recipes("paper")
    assert {recipe.network for recipe in networks} == {"lenet5"}
    assert {recipe.source for recipe in networks} == {Source("cifar10")}
    assert all(recipe.level == 0.1 for recipe in networks)


def test_no_network_reached_the_level(reproduced, tiny, monkeypatch):
    never = replace(tiny, level=1e-9, most_epochs=1)
    monkeypatch.setattr(invariance, "recipes", lambda scale: [never])
    values = reproduced("invariance")
    assert "1 of 1 networks did not reach" in values["findings"][0]
    assert values["tables"] == []
