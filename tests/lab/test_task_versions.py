"""The version of a task: raised with its numbers, so that runs of another version are never taken for its own."""

import hashlib
import json
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from relflat.cli.options import Budget
from relflat.cli.plan import plan_for
from relflat.errors import ConfigError
from relflat.lab.report import study
from relflat.lab.tasks import TASKS
from relflat.lab.train import store
from relflat.lab.train.config import SCHEMA, make
from relflat.lab.train.loop import train
from relflat.lab.train.measuring import measure_run

PINNED = Path(__file__).with_name("task_versions.json")
IN_THE_HASH = {"epochs", "batch_size"}  # a run's hash has them, as it has lr and weight_decay
FOR_READERS = {"name", "summary", "version"}


def described(value):
    """A value as text that depends on what it does as far as its names and arguments say."""
    if isinstance(value, partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, dict):
        return {key: described(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        skipped = {"lr", "weight_decay"}
        return [
            type(value).__name__,
            {f.name: described(getattr(value, f.name)) for f in fields(value) if f.name not in skipped},
        ]
    return getattr(value, "__qualname__", repr(value))


def settings_of(task):
    """Eight digits that stand for all settings of a task that are not in a run's hash."""
    kept = [field.name for field in fields(task) if field.name not in IN_THE_HASH | FOR_READERS]
    text = json.dumps({name: described(getattr(task, name)) for name in kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def test_a_task_that_changed_has_another_version():
    found = {name: {"version": task.version, "settings": settings_of(task)} for name, task in TASKS.items()}
    pinned = json.loads(PINNED.read_text())
    changed = {name: found[name] for name in pinned if found.get(name) != pinned[name]}
    assert found == pinned, (
        f"Raise `version` of a task whose numbers changed, then write this into {PINNED.name}: {changed}; "
        f"new: { {name: found[name] for name in found if name not in pinned} }"
    )


def test_a_changed_setting_is_seen():
    digits = TASKS["digits"]
    others = [
        replace(digits, augment=None),
        replace(digits, augment=partial(digits.augment.func, pad=2)),
        replace(digits, optimizer=replace(digits.optimizer, momentum=0.8)),
        replace(digits, model=TASKS["cifar10"].model),
    ]
    assert len({settings_of(digits), *map(settings_of, others)}) == 5
    assert settings_of(replace(digits, epochs=3)) == settings_of(digits)


@pytest.mark.parametrize(
    ("given", "digest"),
    [
        ({"task": "digits"}, "901c6476c4"),
        ({"task": "fashion-mnist", "algorithm": "fam"}, "dbff8a53ce"),
        ({"task": "addition", "algorithm": "sam"}, "ca1c05e445"),
    ],
)
def test_hashes_of_earlier_runs_stay(given, digest):
    """Raise the schema, and write down new hashes, when a key of the flat values is added, renamed or removed."""
    assert SCHEMA == 3
    assert make(given).digest == digest


@pytest.fixture
def raised(monkeypatch):
    """Raises the version of digits."""
    return lambda: monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], version=2))


def test_runs_of_another_version_are_not_reused(tmp_path, raised):
    old = make({"task": "digits", "epochs": 1})
    train(old, tmp_path / "run", tensorboard=False)
    raised()
    new = make({"task": "digits", "epochs": 1})
    assert new.digest != old.digest
    assert make(new.flat()) == new
    said = r"The task 'digits' has changed \(version 1, now 2\) since"
    with pytest.raises(ConfigError, match=f"{said} the run in .* was trained. Choose another --name, or"):
        train(new, tmp_path / "run", tensorboard=False)
    with pytest.raises(ConfigError, match=f"{said} this run was trained; train it again"):
        measure_run(tmp_path / "run")
    train(new, tmp_path / "run", fresh=True, tensorboard=False)
    assert store.config_of(tmp_path / "run") == new


def test_a_comparison_of_another_version_is_not_gone_on_with(tmp_path, raised):
    def plan():
        return plan_for("digits", ["plain", "sam"], Budget(1, search_seeds=1, trials=1), epochs=1)

    before, folder, runs = plan(), tmp_path / "out", tmp_path / "runs"
    study.open_study(folder, before, runs, "Notes.")
    study.open_study(folder, plan(), runs, "The same in other words.")
    study.carry_out(folder, before, runs, 1, lambda trial: None)
    default = study.folder_for(before, runs)
    raised()
    assert study.folder_for(plan(), runs) != default
    said = r"The task 'digits' has changed \(version 1, now 2\) since the comparison in .* was"
    with pytest.raises(ConfigError, match=f"{said} begun. Choose another --out"):
        study.open_study(folder, plan(), runs, "Notes.")
    with pytest.raises(ConfigError, match=f"{said} made. Give its relflat compare command again"):
        study.rebuild(folder)


def test_a_task_file_may_have_a_version_too(tmp_path):
    path = tmp_path / "mine.py"
    text = (
        "from dataclasses import replace\nfrom relflat.lab.tasks import TASKS\n"
        "task = replace(TASKS['digits'], version={})\n"
    )
    path.write_text(text.format(1))
    first = make({"task": f"{path}:task"})
    path.write_text(text.format(2))
    second = make({"task": f"{path}:task"})
    assert second.source.endswith(" version 2")
    assert make(second.flat()) == second
    with pytest.raises(ConfigError, match=r"The task file .*mine\.py has changed since this run was trained"):
        make(first.flat())
