import json
from dataclasses import replace

import pytest

from relflat.lab.compare.search import Plan
from relflat.lab.train.config import make
from relflat.papers import table1
from relflat.papers.table1 import GRIDS, PAPER, SIZES, Part, Size, plan_of

TINY = {"train_size": 120, "epochs": 2}


@pytest.fixture
def tiny(monkeypatch):
    """Digits in the place of CIFAR-10, two settings an arm and two seeds."""
    part = Part("CIFAR-10", "digits", "digits", 0.1, "an MLP")
    monkeypatch.setitem(SIZES, "small", Size((0, 1), TINY, (part,), search=True))
    monkeypatch.setattr(table1, "GRIDS", {name: grid[:2] for name, grid in GRIDS.items()})
    return part


def test_a_tiny_table(reproduced, tiny, tmp_path):
    values = reproduced("table1", "--out", "out")
    data = values["data"]["CIFAR-10"]
    assert [row[0] for row in values["tables"][0]["rows"]] == [
        "plain",
        "SAM",
        "FAM output layer",
        "FAM radius",
        "dropout",
    ]
    assert [row[1] for row in values["tables"][0]["rows"]][:3] == ["95.53 ± 0.0001", "95.61 ± 0.001", "95.62 ± 0.002"]
    assert all(len(runs) == 2 for runs in data["tested"].values())
    assert len(data["search"]) == 10
    for arm, settings in data["chosen"].items():
        own = [trial for trial in data["search"] if trial["arm"] == arm]
        assert {"arm": arm, "settings": settings, "score": max(trial["score"] for trial in own)} in own
    assert any("the paper has +0.09 points" in line for line in values["findings"])
    assert any("2 seeds can show nothing" in line for line in values["findings"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    for path in (tmp_path / "runs").glob("*/result.json"):  # the test split is not seen while choosing
        config = json.loads((path.parent / "config.json").read_text())
        tested = json.loads(path.read_text())["test"] is not None
        assert tested == (config["seed"] < 100)


def test_an_interrupted_table_goes_on(relflat, reproduced, tiny, monkeypatch, tmp_path):
    from relflat.lab.compare import trials

    train, calls = trials.train, []

    def counted(config, folder, **options):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(config.digest)
        return train(config, folder, **options)

    monkeypatch.setattr(trials, "train", counted)
    code, out, _ = relflat("reproduce", "table1", "--workers", "1", "--json")
    assert (code, out) == (130, "")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    assert len(before) == 7
    monkeypatch.setattr(trials, "train", train)
    reproduced("table1")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_the_papers_settings():
    size = SIZES["paper"]
    assert [part.title for part in size.parts] == list(PAPER)
    plans: dict[str, Plan] = {part.title: plan_of(part, size) for part in size.parts}
    assert all(len(arm.grid) == 1 for plan in plans.values() for arm in plan.arms)
    for title, plan in plans.items():
        fam = next(arm for arm in plan.arms if arm.name == "fam-output")
        config = plan.config(fam, fam.grid[0], 0)
        assert config.settings.strength == {"CIFAR-100": 1.0}.get(title, 0.1)
        assert (config.settings.layer, config.settings.bound, config.settings.gradient) == ("output", None, "full")
        assert config.train_size is None
    arm = plans["CIFAR-10"].arms[0]
    resnet = plans["CIFAR-10"].config(arm, arm.grid[0], 0)
    expected = make({"task": "cifar10-resnet18", "lr": 0.03, "epochs": 250, "batch_size": 64, "weight_decay": 5e-4})
    assert resnet == expected
    svhn = plans["SVHN"].config(arm, arm.grid[0], 0)
    assert (svhn.lr, svhn.epochs, svhn.batch_size) == (0.1, 100, 128)
    wrn = plans["Fashion-MNIST"].config(arm, arm.grid[0], 0)
    assert (wrn.lr, wrn.epochs, wrn.batch_size) == (0.01, 200, 64)


def test_the_papers_scale_does_each_run_once_without_a_search(reproduced, tiny, monkeypatch):
    monkeypatch.setitem(SIZES, "paper", replace(SIZES["paper"], parts=(tiny,), seeds=(0,), common=TINY))
    data = reproduced("table1", "--scale", "paper")["data"]["CIFAR-10"]
    assert data["chosen"]["fam-output"] == {"layer": "output", "bound": None, "strength": 0.1}
    assert [len(runs) for runs in data["tested"].values()] == [1] * 5


def test_data_that_was_not_fetched(relflat, monkeypatch, tmp_path):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    code, _, err = relflat("reproduce", "table1", "--scale", "paper")
    assert code == 2
    assert "relflat data get" in err
    assert "svhn" in err
