from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fetched import have
from relflat.errors import DataError
from relflat.lab.compare.trials import Trial
from relflat.lab.data.fetch import files
from relflat.lab.tasks import TASKS
from relflat.papers import skulls, table2
from relflat.papers.experiment import Context
from relflat.papers.skull_tasks import Autoencoder
from relflat.papers.table2 import ARMS, SIZES, STRENGTHS, Arm, conclude, configuration

FEW = skulls.Sizes(train=2, validation=2, evaluation=2)
pytestmark = pytest.mark.xdist_group("monai")  # takes 15 s to import


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A task of few skulls and a small autoencoder."""
    have("skulls")
    made = skulls.make(skulls.read_project(files("skulls") / skulls.PROJECT), FEW)
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    skulls.arrays.cache_clear()
    skulls.write(skulls.kept(FEW), made)
    small = {"model": partial(Autoencoder, (2, 2, 2, 2, 2)), "splits": partial(skulls.splits, sizes=FEW)}
    monkeypatch.setitem(TASKS, "skulls", replace(TASKS["skulls"], **small))
    yield
    skulls.arrays.cache_clear()


@pytest.mark.data
def test_the_command_trains_every_arm_and_scores_both_sets(few, reproduced, monkeypatch):
    common = {"task": "skulls", "epochs": 1, "batch_size": 2, "lr": 1e-3}
    monkeypatch.setitem(SIZES, "small", replace(SIZES["small"], common=common))
    monkeypatch.setattr(table2, "ARMS", (ARMS[0], ARMS[5], ARMS[10]))
    values = reproduced("table2")
    arms = values["data"]["arms"]
    assert [(arm["strength"], arm["gradient"]) for arm in arms] == [(None, None), (0.7, "full"), (0.7, "weights")]
    for arm in arms:
        for part in ("first", "second"):
            assert set(arm["mean"][part]) == {"dice", "implant_dice", "hd", "hd95", "spread"}
            assert all(np.isfinite(value) for value in arm["mean"][part].values())
        assert np.isfinite(arm["mean"]["kappa"])
    norms = [arm["mean"]["weight_norm"] for arm in arms]
    assert len(set(norms)) == 3  # the penalty and its kind of gradient reach the layer
    monkeypatch.setattr("relflat.lab.train.loop.run_epoch", None)
    assert reproduced("table2")["data"] == values["data"]


def test_the_paper_scale_has_its_strengths_rate_and_epochs():
    size = SIZES["paper"]
    plain, *others = (configuration(arm, 0, size) for arm in ARMS)
    assert (plain.algorithm, plain.epochs, plain.lr) == ("plain", 200, 1e-4)
    assert [each.settings.strength for each in others] == [0.0006, 0.002, 0.02, 0.1, 0.7] * 2
    assert [each.settings.gradient for each in others] == ["full"] * 5 + ["weights"] * 5
    assert {each.settings.layer for each in others} == {"from_latent"}
    layer = Autoencoder().from_latent
    assert tuple(layer.weight.shape) == (64, 8)
    assert len(size.seeds) == 3


def trial(arm, dice, spread, diverged=False):
    """A finished training with these scores on both sets."""
    scores = {"dice": dice, "implant_dice": 0.1, "hd": 20.0, "hd95": 10.0, "spread": spread}
    result = {
        "status": "diverged" if diverged else "finished",
        "test": None if diverged else scores,
        "shifts": None if diverged else {"larger-defects": scores},
        "flatness": None if diverged else {"value": 1.0, "weight_norm": 2.0},
    }
    return Trial(configuration(arm, 0, SIZES["small"]), result, [])


def outcome(full, weights, lost=()):
    """Made-up trainings with these spreads by strength, Dice .60 for plain and .58 for the rest."""
    spreads = dict(zip([("full", each) for each in STRENGTHS], full, strict=True))
    spreads |= dict(zip([("weights", each) for each in STRENGTHS], weights, strict=True))
    by_arm = {ARMS[0]: [trial(ARMS[0], 0.60, 0.5)]}
    for (gradient, strength), spread in spreads.items():
        arm = Arm(strength, gradient)
        by_arm[arm] = [trial(arm, 0.58, spread, diverged=(gradient, strength) in lost)]
    return conclude(by_arm, "small")


def test_a_collapse_is_said_plainly_and_only_where_it_is():
    found = outcome([0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.01, 0.0])
    assert "all of Lemma 1: no strength collapses" in found.findings[1]
    assert "weight only: at strength 0.1, 0.7 the output has collapsed to one skull" in found.findings[2]
    collapsed = {row[0]: row[-1] for row in found.tables[0].rows}
    assert [name for name, state in collapsed.items() if state == "yes"] == [
        "FAM 0.1, this layer's weight only",
        "FAM 0.7, this layer's weight only",
    ]
    assert "Dice -0.020 against plain; the paper has +0.071" in found.findings[3]


def test_arms_that_collapse_are_not_called_better():
    found = outcome([0.0] * 5, [0.0] * 5)
    assert found.findings[3].startswith("No arm with FAM still looks at its input")


def test_a_diverged_training_is_named():
    found = outcome([0.5] * 5, [0.5] * 5, lost=[("full", 0.7)])
    assert found.findings[-1] == "Diverged, and therefore without figures: FAM 0.7, all of Lemma 1."
    assert "diverged" in found.tables[0].rows[5]


def test_without_the_scan_the_error_has_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    skulls.arrays.cache_clear()
    with pytest.raises(DataError, match="relflat data get skulls"):
        table2.run(Context("paper", tmp_path, tmp_path / "runs"))
