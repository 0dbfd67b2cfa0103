import math
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from synthetic import ARMS, PLAN, trial

from relflat.cli.engines import Engine
from relflat.cli.options import Budget
from relflat.cli.plan import plan_for
from relflat.errors import ConfigError
from relflat.lab.compare import arms
from relflat.lab.compare.search import choose, compare, conclude, judge, plan_from
from relflat.lab.compare.trials import workers
from relflat.lab.data import splits
from relflat.lab.data.splits import Splits
from relflat.lab.report.verdict import at_the_edge
from relflat.lab.train import store
from relflat.lab.train.timing import step_costs

PLAIN, SAM, RADIUS = ARMS


def test_arms_get_equal_numbers_of_trials():
    with pytest.raises(ConfigError, match="same number of settings"):
        replace(PLAN, arms=(PLAIN, replace(SAM, values=(0.1, 0.2, 0.3))))
    assert len({len(arm.values) for arm in arms.ARMS.values()} - {0}) == 1  # none: not searched


def test_arms_have_different_names():
    with pytest.raises(ConfigError, match="two arms or more"):
        replace(PLAN, arms=(PLAIN,))
    with pytest.raises(ConfigError, match="more than once"):
        arms.arms_named(["plain", "sam", "sam"])
    assert arms.arms_named(["plain,sam", "fam"]) == arms.arms_named(["plain", "sam", "fam"])
    with pytest.raises(ConfigError, match="did you mean 'fam-radius'"):
        arms.arms_named(["fam-radios"])


@pytest.mark.parametrize("arm", arms.ARMS.values(), ids=arms.ARMS)
def test_every_setting_of_every_arm_is_a_valid_configuration(arm):
    digests = {PLAN.config(arm, settings, 0).digest for settings in arm.grid}
    assert len(digests) == max(1, len(arm.values))
    assert arm.origin


def test_seeds_of_choosing_and_testing_differ():
    with pytest.raises(ConfigError, match=r"Seeds \[1\]"):
        replace(PLAN, search_seeds=(1, 5))
    with pytest.raises(ConfigError, match="at least one seed"):
        replace(PLAN, seeds=())


def test_plan_survives_a_round_trip_through_json(tmp_path):
    store.write_json(tmp_path / "plan.json", asdict(PLAN))
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


def test_workers_start_in_the_environment_of_now_and_leave_ctrl_c_to_their_parent(monkeypatch):
    """On Linux they are forked from a process that is older than both of these."""
    for seen in ("before", "after"):
        monkeypatch.setenv("RELFLAT_SEEN", seen)
        with workers(2) as pool:
            assert pool.submit(os.getenv, "RELFLAT_SEEN").result() == seen
            assert signal.SIGINT in pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
            assert pool.submit(torch.get_num_threads).result() == 1


def test_comparison_without_a_search_tests_the_usual_settings(tmp_path):
    usual = (replace(PLAIN, values=(0.0,)), replace(RADIUS, values=(0.2,)))
    plan = replace(PLAN, common={"train_size": 100, "epochs": 1}, arms=usual, search_seeds=(), seeds=(0,))
    seen = []
    with workers(1) as pool:
        outcome = compare(plan, tmp_path, pool, seen.append)
    assert len(seen) == plan.runs == 2
    assert {name: one.settings for name, one in outcome.chosen.items()} == {a.name: a.grid[0] for a in usual}
    assert all(one.result["test"]["accuracy"] > 0 for trials in outcome.finals.values() for one in trials)


GRID = (0.1, 0.2, 0.4)


@pytest.mark.parametrize(
    ("tried", "best", "below", "value"),
    [
        (GRID, 0.4, None, 0.8),
        (GRID, 0.1, None, 0.05),
        (GRID, 0.2, None, None),  # inside
        (GRID, 0.4, 0.8, None),  # the limit itself is out
        (GRID, 0.4, 0.9, 0.8),
        ((0.05, *GRID), 0.05, None, 0.025),
        ((0.0, *GRID), 0.0, None, None),
        ((0.3, 0.1, 0.2), 0.3, None, 0.45),  # as large as the last step, whatever the order
    ],
)
def test_a_step_past_the_end_of_a_grid(tried, best, below, value):
    arm = replace(SAM, values=GRID, below=below, fixed={"adaptive": True})
    assert arm.beyond(tried, best) == (None if value is None else {"adaptive": True, "rho": pytest.approx(value)})
    assert replace(arm, values=GRID[:2]).beyond(GRID[:2], 0.2) is None  # two values are no grid with an inside


def made_up(score):
    """A way to do jobs without training: validation and test accuracy are a function of the configuration."""
    done = []

    def do(jobs):
        done.extend(jobs)
        return [trial(SAM, 0, score(job.config.flat()), 1.0) for job in jobs]

    return do, done


def searched(plan, score):
    do, jobs = made_up(score)
    found = conclude(plan, Path(), do, {})
    return found, [job.config.flat() for job in jobs if not job.test], [job.config.flat() for job in jobs if job.test]


WIDE = replace(PLAN, arms=(replace(PLAIN, values=(1e-3, 1e-2, 1e-1)), replace(SAM, values=GRID)), beyond=2)


@pytest.mark.parametrize(
    ("peak", "tried", "chosen"),
    [
        (0.2, GRID, 0.2),
        (0.8, (*GRID, 0.8, 1.6), 0.8),
        (0.06, (0.025, 0.05, *GRID), 0.05),
        (9.0, (*GRID, 0.8, 1.6), 1.6),
    ],
)
def test_the_search_goes_past_the_end_of_a_grid(peak, tried, chosen):
    found, trials, _ = searched(WIDE, lambda c: 0.9 - 0.1 * abs(math.log2(c.get("rho", 1.0) / peak)) / 10)
    own = [each.settings["rho"] for each in found.candidates if each.arm == "sam"]
    assert own == pytest.approx(tried)
    assert sorted({c["rho"] for c in trials if c["algorithm"] == "sam"}) == pytest.approx(tried)
    assert found.chosen["sam"].settings["rho"] == pytest.approx(chosen)
    assert at_the_edge(found) == (["plain", "SAM"] if peak == 9.0 else ["plain"])  # plain's scores are all the same
    assert len(trials) <= WIDE.runs - len(WIDE.seeds) * 2


def test_a_search_of_two_values_or_without_leave_goes_nowhere():
    for plan in (replace(WIDE, beyond=0), replace(PLAN, beyond=2)):
        found, trials, _ = searched(plan, lambda c: c.get("rho", 0.0))
        assert len(found.candidates) == len(trials) == sum(len(arm.values) for arm in plan.arms)


FAMS = ("plain", "smoothing", "fam-default", "fam")


def test_an_untuned_table_beside_the_tuned_one():
    plan = plan_for("digits", FAMS, Budget(seeds=2, search_seeds=1, also_untuned=True))
    found, _, tested = searched(plan, lambda c: 0.5 + (c.get("smoothing", 0.0) + (c.get("bound") or 0.0)) / 10)
    assert [arm.name for arm in found.untuned.arms] == ["plain", "smoothing", "fam-default"]  # fam would be the same
    usual = {name: dict(one.settings) for name, one in found.untuned.chosen.items()}
    assert usual == {"plain": {}, "smoothing": {"smoothing": 0.1}, "fam-default": {"size": 0.004}}
    assert dict(found.chosen["smoothing"].settings) == {"smoothing": 0.8}  # 1.6 is no smoothing
    assert found.chosen["fam"].settings["bound"] == pytest.approx(9.6)
    assert not found.chosen["fam-default"].trials
    assert len(tested) == 2 * (4 + 3)
    assert {c["weight_decay"] for c in tested if c["algorithm"] == "smoothing"} == {5e-4}
    only = plan_for("digits", FAMS, Budget(seeds=2, trials=0))
    assert [arm.name for arm in only.arms] == ["plain", "smoothing", "fam-default"]


def test_a_recipe_is_chosen_by_plain_and_put_under_every_arm():
    plan = plan_for("digits", (*FAMS, "dropout"), Budget(seeds=2, search_seeds=1, trials=1, recipe=True))
    assert [arm.name for arm in plan.arms] == ["plain", "fam-default", "fam"]
    assert plan.in_recipe == ("smoothing", "dropout")
    peaks = {"recipe_smoothing": 0.2, "recipe_dropout": 0.0}

    def score(config):
        return 0.9 - sum(abs(config.get(key, 0.0) - peak) for key, peak in peaks.items())

    found, trials, tested = searched(plan, score)
    assert dict(found.recipe[0].settings) == {"recipe_smoothing": 0.0}  # without any, first
    assert len(found.recipe) == 5 + 4  # digits has its own augmentation, which stays
    assert {c["algorithm"] for c in trials[:9]} == {"plain"}
    assert {(c["recipe_smoothing"], c.get("recipe_dropout")) for c in [*trials[9:], *tested]} == {(0.2, None)}
    assert found.plan.common["recipe_dropout"] == 0.0
    assert found.failed == {}


def test_a_recipe_that_is_given_needs_no_search():
    plan = plan_for("digits", (*FAMS, "dropout"), Budget(seeds=1, trials=0), recipe_dropout=0.2)
    assert (plan.recipe, plan.in_recipe, plan.recipe_seeds) == ({}, ("dropout",), ())
    assert all(plan.config(arm, arm.grid[0], 0).recipe_dropout == 0.2 for arm in plan.arms)
    both = plan_for("digits", FAMS, Budget(seeds=1, recipe=True), recipe_smoothing=0.1)
    assert list(both.recipe) == ["recipe_dropout"]


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
