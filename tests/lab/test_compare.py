from dataclasses import replace

import pytest
from synthetic import PLAN, trial

from relflat.errors import ConfigError
from relflat.lab import splits
from relflat.lab.compare import choose, compare, judge
from relflat.lab.timing import step_costs
from relflat.lab.trials import workers


def test_methods_get_equal_numbers_of_trials():
    with pytest.raises(ConfigError, match="same number of settings"):
        replace(PLAN, grids={"plain": [{}], "sam": [{"rho": 0.1}, {"rho": 0.2}]})


def test_seeds_of_choosing_and_testing_differ():
    with pytest.raises(ConfigError, match=r"Seeds \[1\]"):
        replace(PLAN, search_seeds=(1, 5))


def test_best_validation_accuracy_is_chosen_and_loss_breaks_ties():
    low, high = (
        judge("sam", {"rho": 1}, [trial("sam", 0, 0.8, 1)]),
        judge("sam", {"rho": 2}, [trial("sam", 0, 0.9, 1)]),
    )
    assert choose([low, high], "sam") is high
    cheaper = replace(high, loss=high.loss / 2)
    assert choose([high, cheaper, low], "sam") is cheaper


def test_a_setting_that_diverged_once_is_never_preferred():
    bad = judge("sam", {"rho": 9}, [trial("sam", 0, 1.0, 1), trial("sam", 1, 1.0, 1, diverged=True)])
    poor = judge("sam", {"rho": 1}, [trial("sam", 0, 0.2, 1), trial("sam", 1, 0.2, 1)])
    assert bad.diverged == 1
    assert choose([bad, poor], "sam") is poor


def test_comparison_from_search_to_test(tmp_path):
    """The whole way with real training in two processes; the first trials leave the test split alone."""
    plan = replace(
        PLAN,
        common={"train_size": 100, "epochs": 1},
        grids={"plain": [{}], "fam": [{"strength": 0.1}]},
        seeds=(0, 1),
    )
    seen = []
    with workers(2) as pool:
        outcome = compare(plan, tmp_path, pool, seen.append)
    assert len(seen) == 2 + 4
    assert [one.result["test"] for one in outcome.candidates[0].trials] == [None]
    assert {method: [t.config.seed for t in trials] for method, trials in outcome.finals.items()} == {
        "plain": [0, 1],
        "fam": [0, 1],
    }
    assert all(one.result["test"]["accuracy"] > 0 for trials in outcome.finals.values() for one in trials)


def test_step_costs_are_relative_to_the_first(monkeypatch):
    def forbidden(*args):
        raise AssertionError("timing needs no test data")

    monkeypatch.setattr(splits, "_test_split", forbidden)
    configs = [PLAN.config(method, {}, 0) for method in ("plain", "sam")]
    plain, sam = step_costs(configs, rounds=9, block=4)
    assert plain.ratio == plain.low == plain.high == 1
    assert 1.2 < sam.ratio < 4  # two passes, but shared overhead
    assert sam.low <= sam.ratio <= sam.high
