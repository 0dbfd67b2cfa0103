from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from relflat import reference
from relflat.errors import DataError
from relflat.papers import layers
from relflat.papers.layers import HIDDEN, LAYERS, conclude, measure, recipes
from relflat.papers.trained import Source, grid, samples, trained

DIGITS = Source("digits", 60, 300, held_out=500)
TINY = grid(
    DIGITS, "mlp-8x8", batch_sizes=(10,), lrs=(0.01, 0.02), weight_decays=(0.0, 1e-3), seeds=(0,), most_epochs=80
)


def test_kappa_of_each_layer_is_that_of_the_dense_definition(tmp_path):
    network = trained(TINY[0], tmp_path).network
    found = measure(network, TINY[0])
    train = samples(DIGITS).train
    for layer in ("fc4", "output"):  # ReLU after it: the Gauss-Newton curvature is the Hessian
        at_layer = reference.at_layer(network, nn.CrossEntropyLoss(), train.inputs, train.targets, layer)
        expected = float(reference.kappa(*at_layer))
        error = 5 * found["stderr"][layer] + 1e-4 * expected
        assert abs(found["kappa"][layer] - expected) < error < expected
    assert list(found["kappa"]) == list(found["normalised"]) == list(LAYERS)


def never(*args):
    raise AssertionError("what is kept is not measured again")


def test_the_command_correlates_every_layer_and_does_nothing_twice(reproduced, monkeypatch):
    monkeypatch.setattr(layers, "recipes", lambda scale: TINY)
    values = reproduced("layers")
    networks = values["data"]["networks"]
    assert all(network["reached"] for network in networks)
    for layer in LAYERS:
        r = np.corrcoef([each["kappa"][layer] for each in networks], [each["gap"] for each in networks])[0, 1]
        assert values["data"]["associations"]["kappa"][layer]["r"][0] == pytest.approx(r)
    assert [row[:2] for row in values["tables"][0]["rows"]][:4] == [
        ["fc1", "0.73"], ["fc2", "0.70"], ["fc3", "0.72"], ["fc4", "0.71"]
    ]  # fmt: skip
    monkeypatch.setattr(layers, "measure", never)
    assert reproduced("layers")["data"] == values["data"]


def outcome(kappas):
    """Made-up networks whose hidden layers have these kappas; gaps rise from 1 to 2."""
    gaps = np.linspace(1, 2, len(kappas))
    records = [
        {"reached": True, "gap": gap, "recipe": asdict(TINY[0])}
        | {form: dict.fromkeys(LAYERS, value) for form in ("kappa", "normalised")}
        for gap, value in zip(gaps, kappas, strict=True)
    ]
    return conclude([TINY[0]] * len(gaps), records, "small")


def test_findings_follow_the_numbers():
    rising, falling = outcome(range(12)), outcome(range(12, 0, -1))
    noise = outcome(np.random.default_rng(1).normal(size=12))
    assert all("; reproduced: every hidden layer" in text for text in rising.findings[:2])
    assert (
        "not reproduced: 0 of 4 hidden layers are shown to go with the gap, and 4 against it" in falling.findings[0]
    )
    assert noise.findings[0].endswith("not reproduced: 0 of 4 hidden layers are shown to go with the gap.")
    with pytest.raises(DataError, match="0 of 1 networks"):
        conclude(TINY[:1], [{"reached": False}], "small")


def test_the_paper_scale_has_four_hidden_layers_on_all_pictures():
    networks = recipes("paper")
    assert {each.source for each in networks} == {Source("fashion-mnist")}
    assert len(networks) == 270
    names = {name for name, _ in layers_of(networks[0].network)}
    assert names == set(LAYERS)
    assert len(HIDDEN) == 4


def layers_of(name):
    from relflat.papers.trained import NETWORKS

    return [(key, module) for key, module in NETWORKS[name]().named_children() if isinstance(module, torch.nn.Linear)]
