import json

import pytest
import torch

from relflat.lab.compare.trials import Here, each
from relflat.papers import trained as module
from relflat.papers.network_study import by_setting, named
from relflat.papers.trained import NETWORKS, Recipe, Source, evaluate, grid, samples, trained
from relflat.reparam import random_rescaling

DIGITS = Source("digits", 200, 300, held_out=500)


def recipe(**changes):
    values = {"network": "mlp-8x8", "batch_size": 20, "lr": 0.02, "weight_decay": 0.0, "seed": 0}
    return Recipe(DIGITS, **values | changes)


def test_training_stops_at_the_level_and_the_network_is_the_one_that_was_measured(tmp_path):
    found = trained(recipe(), tmp_path)
    halves = samples(DIGITS)
    assert found.result["reached"]
    assert found.result["epochs"] < 150
    train, test = evaluate(found.network, halves.train)[0], evaluate(found.network, halves.test)[0]
    assert train < 0.1
    assert found.result["train_loss"] == pytest.approx(train)
    assert found.result["gap"] == pytest.approx(test - train)
    assert (len(halves.train), len(halves.test)) == (200, 300)
    before = trained(recipe(most_epochs=found.result["epochs"] - 1), tmp_path)
    assert not before.result["reached"]  # it stopped at the first epoch below the level, not later


def test_a_finished_network_is_read_and_not_trained_again(tmp_path, monkeypatch):
    first = trained(recipe(), tmp_path)
    monkeypatch.setattr(module, "fit", None)
    again = trained(recipe(), tmp_path)
    assert again.result == first.result
    for one, other in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_same_recipe_gives_the_same_network_and_leaves_the_global_generator_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    state = torch.get_rng_state()
    one = trained(recipe(most_epochs=2), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    other = trained(recipe(most_epochs=2), tmp_path / "b")
    third = trained(recipe(most_epochs=2, seed=1), tmp_path / "b")
    assert one.result == other.result
    assert third.result["train_loss"] != one.result["train_loss"]


def test_a_network_that_does_not_get_there_is_named(tmp_path):
    recipes = [recipe(), recipe(most_epochs=1), recipe(lr=1e6)]
    results = [trained(each, tmp_path).result for each in recipes]
    assert [result["reached"] for result in results] == [True, False, False]
    assert results[2]["train_loss"] is None or results[2]["epochs"] == 150
    (text,) = named(recipes, results)
    assert text.startswith("2 of 3 networks did not reach a training loss of 0.1")
    assert "after 1 epochs" in text
    assert "lr 1e+06" in text
    assert named(recipes[:1], results[:1]) == []


def test_settings_are_held_against_gap_and_kappa():
    records = [
        {"gap": gap, "recipe": {"batch_size": size, "lr": 0.1 - gap / 100, "weight_decay": decay}}
        for gap, size, decay in ((1.0, 10, 0.0), (2.0, 20, 0.0), (3.0, 30, 0.0))
    ]
    text = by_setting(records, [3.0, 2.0, 1.0])
    assert "(tau: batch size +1.00, learning rate -1.00)" in text
    assert "with kappa (batch size -1.00, learning rate +1.00" in text


def test_settings_and_weights_are_told_apart_by_the_name_of_the_file(tmp_path):
    recipes = grid(
        DIGITS, "mlp-8x8", batch_sizes=(10, 20), lrs=(0.1, 0.2), weight_decays=(0.0, 0.1), seeds=(0, 1), most_epochs=3
    )
    assert len({each.digest for each in recipes}) == len(recipes) == 16
    trained(recipes[0], tmp_path)
    assert json.loads((tmp_path / f"{recipes[0].digest}.json").read_text())["recipe"]["batch_size"] == 10


def test_lenet_has_the_layer_of_the_paper_and_can_be_rescaled():
    network = NETWORKS["lenet5"]().eval()
    assert network.output.weight.shape == (10, 84)
    x = torch.randn(4, 3, 32, 32)
    before = network(x)
    assert len(random_rescaling(network)) == 4
    torch.testing.assert_close(network(x), before)


def fails(number):
    if number == 1:
        raise ValueError(f"number {number}")
    return 10 * number


def test_work_is_returned_in_order_and_an_error_is_not_lost():
    seen = []
    assert each(Here(), fails, [0, 2, 3], seen.append) == [0, 20, 30]
    assert seen == [0, 20, 30]
    with pytest.raises(ValueError, match="number 1"):
        each(Here(), fails, [0, 1], seen.append)
