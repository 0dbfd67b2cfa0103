"""Files that were damaged, or that another version wrote: what is said, and that following it mends them."""

import json

import pytest

from relflat.cli.options import Budget
from relflat.cli.plan import plan_for
from relflat.errors import ConfigError, DataError
from relflat.lab.compare.trials import Job, read_trial, run_job
from relflat.lab.report import study
from relflat.lab.train import store
from relflat.lab.train.config import make
from relflat.lab.train.loop import train

GIVEN = {"task": "digits", "epochs": 2, "train_size": 100}


@pytest.fixture
def run(tmp_path):
    """A finished run where a comparison would keep it: its job and its folder."""
    job = Job(make(GIVEN), tmp_path, test=True)
    run_job(job)
    return job, store.folder_of(job.config, tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"status": "fin', "Unterminated string"), ("null", "it holds None"), ("{}", "it has no status, epochs")],
)
def test_a_damaged_result_is_made_again_once_it_is_removed(run, text, why):
    job, folder = run
    path = folder / store.RESULT
    before = path.read_text()
    path.write_text(text)
    for reading in (read_trial, run_job):
        with pytest.raises(DataError, match=rf"result\.json is damaged \({why}.*Remove it and give the same command"):
            reading(job)
    path.unlink()
    run_job(job)
    assert path.read_text() == before


@pytest.mark.parametrize("kept", [120, 0])
def test_cut_metrics_are_noticed_and_written_from_the_checkpoint(run, kept):
    job, folder = run
    path = folder / store.METRICS
    before = path.read_text()
    path.write_text(before[:kept])
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged \(.*Remove .*result\.json"):
        read_trial(job)
    path.write_text("".join(before.splitlines(keepends=True)[:1]))
    with pytest.raises(DataError, match="1 epochs of 2"):
        read_trial(job)
    (folder / store.RESULT).unlink()
    run_job(job)
    assert path.read_text() == before


def test_a_run_of_another_version_says_which(run):
    _, folder = run
    path = folder / store.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "momentum": 0.9}))
    with pytest.raises(DataError, match=r"config\.json does not fit here: Unknown config key 'momentum'") as caught:
        store.config_of(folder)
    assert "written by" not in str(caught.value)
    place = folder / store.ENVIRONMENT
    environment = json.loads(place.read_text())
    environment["packages"]["relflat"] = "7.0"
    place.write_text(json.dumps(environment))
    with pytest.raises(DataError, match=r"It was written by relflat 7\.0; this is \d"):
        store.config_of(folder)


def test_a_damaged_configuration_may_be_replaced(run):
    job, folder = run
    (folder / store.CONFIG).write_text('{"task": "dig')
    with pytest.raises(DataError, match=r"config\.json is damaged .* or give relflat train --fresh"):
        run_job(job)
    assert train(job.config, folder, fresh=True, tensorboard=False)["status"] == "finished"


def test_a_damaged_comparison(tmp_path):
    budget = Budget(seeds=1, search_seeds=1, trials=1)
    plan = plan_for("digits", ["plain", "sam"], budget, epochs=1, train_size=100)
    folder = tmp_path / "out"
    study.open_study(folder, plan, tmp_path / "runs", "")
    study.carry_out(folder, plan, tmp_path / "runs", 1, lambda trial: None)
    costs = folder / study.COSTS
    for text in ('{"plain": 3}', "{}"):
        costs.write_text(text)
        with pytest.raises(DataError, match=r"costs\.json is damaged .*Remove it and give"):
            study.rebuild(folder)
    costs.unlink()
    study.carry_out(folder, plan, tmp_path / "runs", 1, lambda trial: None)
    assert set(store.read_json(costs)) == {"plain", "sam"}
    (folder / study.PLAN).write_text('{"task": "digits"}')
    with pytest.raises(DataError, match=r"plan\.json is damaged or of another version \(KeyError: 'arms'\)"):
        study.rebuild(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "replace(base, model=lambda: nn.Sequential(nn.Linear(63, 10)), layer='0')",
            r"What the task file .*mine\.py gives does not work together(.|\n)*shapes cannot be multiplied",
        ),
        (
            "replace(base, loss=lambda: nn.functional.cross_entropy)",
            r"loss\(\) gives <function .*must give a torch\.nn\.Module; for a function, write a module",
        ),
        ("replace(base, model=lambda: nn.Linear)", r"model\(\) gives <class .*must give a torch\.nn\.Module"),
    ],
)
def test_parts_of_a_task_that_do_not_fit(tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom torch import nn\nfrom relflat.lab.tasks import TASKS\n"
        f"base = TASKS['digits']\ntask = {line}\n"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        train(make({**GIVEN, "task": f"{path}:task"}), tmp_path / "run", tensorboard=False)
    assert len(str(caught.value).splitlines()) < 12
