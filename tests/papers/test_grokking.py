from dataclasses import replace

import pytest

from relflat.lab.compare.trials import Trial
from relflat.papers.grokking import ARMS, SIZES, conclude, fall, onset, restored

TINY = replace(SIZES["small"], common={**SIZES["small"].common, "epochs": 3, "train_size": 60}, seeds=(0, 1))


def history(generalises, epochs=20, memorised=4):
    """Accuracy on validation jumps at an epoch; kappa falls tenfold when memorised and tenfold when it jumps."""
    return [
        {
            "epoch": epoch,
            "train_accuracy": 1.0 if epoch >= memorised else 0.2,
            "validation_accuracy": 0.95 if epoch >= generalises else 0.3 if epoch == generalises - 1 else 0.02,
            "train_loss": 0.1,
            "kappa": 100.0 if epoch < memorised else 10.0 if epoch < generalises else 1.0,
            "confidence": 0.9,
            "weight_norm": 1.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def trials(*onsets, arm="plain"):
    found = []
    for seed, generalises in enumerate(onsets):
        config = replace(TINY.of_arm(arm, seed), epochs=20)
        found.append(Trial(config, {"status": "finished"}, history(generalises)))
    return found


def outcome(*arms):
    plan = replace(TINY, seeds=tuple(range(len(arms[0]))))
    groups = {arm: trials(*onsets, arm=arm) for arm, onsets in zip(ARMS, arms, strict=True)}
    return conclude(plan, groups, "small")


def test_onsets_are_read_from_the_history():
    found = onset(trials(9)[0])
    assert (found.memorised, found.generalised, found.validation, found.kappa) == (4, 9, 0.95, 1.0)
    assert onset(trials(99)[0]).generalised is None


def test_a_passing_peak_is_not_generalisation():
    (trial,) = trials(9)
    trial.history[11]["validation_accuracy"] = 0.5
    assert onset(trial).generalised == 13


def test_the_fall_of_kappa_is_split_where_generalisation_begins():
    found = fall(history(9))
    assert found["before"] == pytest.approx(1.0)
    assert found["during"] == pytest.approx(1.0)
    assert fall(history(99)) is None


def test_findings_follow_the_onsets():
    reproduced = outcome([9, 10], [7, 11], [15, 99], [12, 13])
    assert reproduced.findings[0] == "Plain training generalises at epoch 9, 10."
    assert "1 of 2 seeds earlier than plain, 1 later" in reproduced.findings[1]
    assert "epoch 15, not in 20; 0 of 2 seeds earlier than plain, 2 later" in reproduced.findings[2]
    assert reproduced.findings[4].startswith("Reproduced: on every seed")
    assert outcome([9, 10], [7, 7], [15, 99], [16, 99]).findings[4].startswith("Reproduced in part")
    assert (
        "Not reproduced: the negative strength delays generalisation on 1 of 2"
        in (outcome([9, 10], [7, 7], [8, 99], [9, 9]).findings[4])
    )
    assert "falls by 1.0 powers of ten" in reproduced.findings[5]
    assert [row[2] for row in reproduced.tables[0].rows] == ["9, 10", "7, 11", "15, not in 20", "12, 13"]


def test_a_diverged_run_counts_as_one_that_never_generalises():
    lost = [None, onset(trials(15)[0])]
    assert restored(
        [onset(each) for each in trials(9, 9)], lost, [onset(each) for each in trials(12, 12)], 20
    ).startswith("Reproduced: ")


def test_the_command_trains_all_arms_from_the_same_networks(reproduced, monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, "small", TINY)
    values = reproduced("grokking")
    arms = values["data"]["arms"]
    assert list(arms) == ["plain", "towards flat", "away from flat", "away, removed"]
    assert {len(runs) for runs in arms.values()} == {2}
    kappas = {name: [run["history"][-1]["kappa"] for run in runs] for name, runs in arms.items()}
    assert kappas["towards flat"] < kappas["plain"] < kappas["away from flat"]
    assert kappas["away, removed"] == kappas["away from flat"]  # so early it is not removed yet
    assert "Validation accuracy" in (tmp_path / values["folder"] / "report.html").read_text()
    monkeypatch.setattr("relflat.lab.train.loop.run_epoch", None)
    assert reproduced("grokking")["data"] == values["data"]


def test_knobs_and_removal_reach_the_runs():
    plan = SIZES["paper"]
    plain, towards, away, removed = (plan.of_arm(arm, 3) for arm in ARMS)
    assert plain.algorithm == "plain"
    assert towards.settings.strength == -away.settings.strength > 0
    assert (away.settings.temperature, away.settings.unit_features) == (2.0, True)
    assert away.settings.weight_cap is not None
    assert away.settings.remove_after is None
    assert removed.settings.remove_after == plan.remove_after
    assert replace(removed.settings, remove_after=None) == away.settings
    assert {each.seed for each in (plain, towards, away, removed)} == {3}
