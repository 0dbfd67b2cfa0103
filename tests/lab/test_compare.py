import socket
import sys
import time
from dataclasses import replace

import pytest
from synthetic import ARMS, PLAN, trial

from relflat.cli.engines import Engine
from relflat.errors import ConfigError
from relflat.lab.compare import arms
from relflat.lab.compare.search import choose, compare, judge, plan_from
from relflat.lab.compare.trials import workers
from relflat.lab.data import splits
from relflat.lab.data.splits import Splits
from relflat.lab.train import store
from relflat.lab.train.timing import step_costs

PLAIN, SAM, RADIUS = ARMS


def test_arms_get_equal_numbers_of_trials():
    with pytest.raises(ConfigError, match="same number of settings"):
        replace(PLAN, arms=(PLAIN, replace(SAM, values=(0.1, 0.2, 0.3))))
    assert len({len(arm.values) for arm in arms.ARMS.values()}) == 1


def test_arms_have_different_names():
    with pytest.raises(ConfigError, match="two arms or more"):
        replace(PLAN, arms=(PLAIN,))
    with pytest.raises(ConfigError, match="more than once"):
        arms.arms_named(["plain", "sam", "sam"])
    with pytest.raises(ConfigError, match="did you mean 'fam-radius'"):
        arms.arms_named(["fam-radios"])


@pytest.mark.parametrize("arm", arms.ARMS.values(), ids=arms.ARMS)
def test_every_setting_of_every_arm_is_a_valid_configuration(arm):
    digests = {PLAN.config(arm, settings, 0).digest for settings in arm.grid}
    assert len(digests) == len(arm.values)
    assert arm.origin


def test_seeds_of_choosing_and_testing_differ():
    with pytest.raises(ConfigError, match=r"Seeds \[1\]"):
        replace(PLAN, search_seeds=(1, 5))
    with pytest.raises(ConfigError, match="at least one seed"):
        replace(PLAN, seeds=())


def test_plan_survives_a_round_trip_through_json(tmp_path):
    store.write_json(tmp_path / "plan.json", PLAN.flat())
    assert plan_from(store.read_json(tmp_path / "plan.json")) == PLAN


def test_best_validation_accuracy_is_chosen_and_loss_breaks_ties():
    low, high = (judge("sam", {"rho": 1}, [trial(SAM, 0, 0.8, 1)]), judge("sam", {"rho": 2}, [trial(SAM, 0, 0.9, 1)]))
    assert choose([low, high], "sam") is high
    cheaper = replace(high, loss=high.loss / 2)
    assert choose([high, cheaper, low], "sam") is cheaper


def test_a_setting_that_diverged_once_is_never_preferred():
    bad = judge("sam", {"rho": 9}, [trial(SAM, 0, 1.0, 1), trial(SAM, 1, 1.0, 1, diverged=True)])
    poor = judge("sam", {"rho": 1}, [trial(SAM, 0, 0.2, 1), trial(SAM, 1, 0.2, 1)])
    assert bad.diverged == 1
    assert choose([bad, poor], "sam") is poor


def test_comparison_from_search_to_test(tmp_path):
    """The whole way with real training in two processes; the first trials leave the test split alone."""
    plan = replace(
        PLAN,
        common={"train_size": 100, "epochs": 1},
        arms=(replace(PLAIN, values=(0.0,)), replace(RADIUS, values=(0.2,))),
        seeds=(0, 1),
    )
    seen = []
    with workers(2) as pool:
        outcome = compare(plan, tmp_path, pool, seen.append)
    assert len(seen) == plan.runs == 2 + 4
    assert [one.result["test"] for one in outcome.candidates[0].trials] == [None]
    assert {name: [t.config.seed for t in trials] for name, trials in outcome.finals.items()} == {
        "plain": [0, 1],
        "fam-radius": [0, 1],
    }
    assert [t.config.algorithm for t in outcome.finals["fam-radius"]] == ["fam", "fam"]
    assert all(one.result["test"]["accuracy"] > 0 for trials in outcome.finals.values() for one in trials)


def test_comparison_without_a_search_tests_the_usual_settings(tmp_path):
    usual = (replace(PLAIN, values=(0.0,)), replace(RADIUS, values=(0.2,)))
    plan = replace(PLAN, common={"train_size": 100, "epochs": 1}, arms=usual, search_seeds=(), seeds=(0,))
    seen = []
    with workers(2) as pool:
        outcome = compare(plan, tmp_path, pool, seen.append)
    assert len(seen) == plan.runs == 2
    assert {name: one.settings for name, one in outcome.chosen.items()} == {a.name: a.grid[0] for a in usual}
    assert all(one.result["test"]["accuracy"] > 0 for trials in outcome.finals.values() for one in trials)


def test_step_costs_are_relative_to_the_first(monkeypatch):
    def forbidden(*args):
        raise AssertionError("timing needs no test data")

    monkeypatch.setattr(splits, "Splits", lambda **parts: Splits(**{**parts, "test": forbidden}))
    configs = [PLAN.config(arm, arm.grid[0], 0) for arm in (PLAIN, SAM)]
    plain, sam = step_costs(configs, rounds=9, block=4)
    assert plain.ratio == plain.low == plain.high == 1
    assert 1.2 < sam.ratio < 4  # two passes, but shared overhead
    assert sam.low <= sam.ratio <= sam.high


def test_ray_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'relflat\[ray\]'"):
        Engine(1, "ray").pool(tmp_path)


@pytest.mark.parametrize("address", ["6379", "host", "host:port", "host:99999", "ray://host:10001"])
def test_what_is_no_address_is_named(tmp_path, address):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'relflat[ray]'")
    with pytest.raises(ConfigError, match="is not of the form HOST:PORT"):
        Engine(1, "ray", address).pool(tmp_path)


def test_an_address_that_does_not_answer_is_given_up_soon(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'relflat[ray]'")
    with socket.socket() as bound:  # bound but not listening: nobody else can listen there
        bound.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(ConfigError, match=r"No Ray cluster answers at 127\.0\.0\.1:\d+ \(Connection refused\)"):
            Engine(1, "ray", f"127.0.0.1:{bound.getsockname()[1]}").pool(tmp_path)
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []
