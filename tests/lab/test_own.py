import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from relflat.errors import ConfigError
from relflat.lab.tasks import TASKS, Task, register, task_named
from relflat.lab.train import store
from relflat.lab.train.config import make
from relflat.lab.train.loop import train
from relflat.lab.train.measuring import measure_run

EXAMPLE = Path(__file__).parents[2] / "docs" / "study" / "own_task.py"


@pytest.fixture
def copy(tmp_path):
    """A copy of the documented example that may be changed."""
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE.read_text())
    return path


def test_the_documented_example_learns(tmp_path, copy):
    config = make({"task": f"{copy}:task", "epochs": 5})
    folder = store.folder_of(config, tmp_path)
    result = train(config, folder, tensorboard=False)
    assert result["validation"]["accuracy"] > 0.9
    assert result["test"]["accuracy"] > 0.9
    assert folder.name.startswith("mine-task-plain-")
    assert measure_run(folder)["output"].samples == 299


def test_documented_paths_stay():
    from relflat.lab import data, evaluate, models, splits, tasks

    assert models.mlp is tasks.mlp
    assert splits.classification is data.classification
    assert evaluate.Metric is tasks.Metric


def test_a_name_can_be_registered_once():
    mine = replace(task_named("digits"), name="mine")
    with pytest.raises(ConfigError, match="There is a task called 'digits' already"):
        register(replace(mine, name="digits"))
    assert register(mine) is register(mine) is task_named("mine")
    del TASKS["mine"]


def test_configuration_round_trips_and_follows_the_files_content(copy):
    config = make({"task": f"{copy}:task"})
    assert isinstance(task_named(config.task), Task)
    assert make(json.loads(json.dumps(config.flat()))) == config
    copy.write_text(copy.read_text().replace("lr=0.05", "lr=0.01"))
    changed = make({"task": f"{copy}:task"})
    assert (changed.lr, config.lr) == (0.01, 0.05)
    assert changed.digest != config.digest
    with pytest.raises(ConfigError, match="has changed since this run was trained"):
        make(config.flat())


def test_relative_paths_are_made_whole(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert make({"task": "mine.py:task"}).task == f"{copy}:task"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "task", "Cannot read the task file"),
        ("x = 1\n", "task", r"defines no Task; write  task = Task\(...\)"),
        ("def f(:\n", "task", "SyntaxError"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", "task", r"line 2, in f(.|\n)*ZeroDivisionError"),
        ("from relflat.lab.tasks import TASKS\n\nmine = TASKS['digits']\n", "mien", "did you mean 'mine'"),
    ],
)
def test_files_that_do_not_work_are_explained(tmp_path, text, name, message):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make({"task": f"{path}:{name}"})


def test_a_file_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    (tmp_path / "beside_the_task.py").write_text("from relflat.lab.tasks import TASKS\n\ndigits = TASKS['digits']\n")
    (tmp_path / "mine.py").write_text("from beside_the_task import digits as mine\n")
    assert task_named(make({"task": f"{tmp_path / 'mine.py'}:mine"}).task) is TASKS["digits"]


def test_a_path_without_a_name_gets_the_names_in_the_file(copy, tmp_path):
    copy.write_text(copy.read_text() + "\nother = task\n")
    with pytest.raises(ConfigError, match=rf"Did you mean {copy}:task or {copy}:other\?"):
        make({"task": str(copy)})
    (tmp_path / "empty.py").write_text("x = 1\n")
    for path, message in {"empty.py": r"write  task = Task\(", "none.py": "Cannot read the task file"}.items():
        with pytest.raises(ConfigError, match=message):
            make({"task": str(tmp_path / path)})


def test_splits_larger_than_the_data_are_rejected(copy):
    copy.write_text(copy.read_text().replace("validation=120", "validation=500"))
    with pytest.raises(ConfigError, match="569 samples are too few for 500 validation and 150 test"):
        train(make({"task": f"{copy}:task"}), copy.parent / "run", tensorboard=False)
