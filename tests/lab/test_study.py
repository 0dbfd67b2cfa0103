"""A comparison on disk: killed and resumed, reported again, and blind to test labels while it chooses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from relflat.errors import ConfigError, DataError
from relflat.lab import store, study
from relflat.lab.lock import alone_in
from relflat.lab.trials import workers

OPTIONS = {"seeds": 2, "search_seeds": 1, "trials": 2, "train_size": 100, "epochs": 3, "label_noise": 0.1}
TIMES = {"seconds_per_step", "cost", "environment", "step", "equal_time"}


def small_plan(**values):
    return study.plan_for("digits", ["plain", "fam-radius"], **{**OPTIONS, **values})


def do(folder, runs, plan, processes=1):
    study.open_study(folder, plan, runs, "Notes.")
    return study.carry_out(folder, plan, runs, processes, lambda trial: None)[0]


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


COMMAND = [sys.executable, "-m", "relflat", "compare", "digits", "--arms", "plain", "fam-radius", "--json"]
COMMAND += ["--seeds", "2", "--search-seeds", "1", "--trials", "2", "--train-size", "100", "--epochs", "3"]
COMMAND += ["--label-noise", "0.1", "--workers", "1"]


@pytest.mark.slow
def test_killed_and_resumed_comparison_gives_the_same_numbers(tmp_path):
    whole = do(tmp_path / "whole", tmp_path / "runs-whole", small_plan())
    command = [*COMMAND, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "broken")]
    done = 0
    for wanted in (1, 5):  # killed -9 in the search, then among the tested runs
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while done < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
            done = len(list((tmp_path / "runs").glob("*/result.json")))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "broken" / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(
        path.stat().st_mtime_ns == then for path, then in before.items()
    )  # finished runs are not done twice
    expected = store.read_json(tmp_path / "whole" / "report.json")
    assert len(whole.finals["plain"]) == 2
    assert without_times(store.read_json(tmp_path / "broken" / "report.json")) == without_times(expected)
    assert json.loads(again.stdout)["verdict"] == expected["verdict"]
    assert not list((tmp_path / "runs").glob("*/.*"))  # nothing half-written is left


def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "import os, time\n"
        "from relflat.lab.trials import workers\n"
        "if __name__ == '__main__':\n"
        "    pool = workers(2)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_at_a_time_in_a_folder(tmp_path):
    with (
        alone_in(tmp_path),
        pytest.raises(ConfigError, match="Another process is training in"),
        alone_in(tmp_path, patience=0.1),
    ):
        pass
    with alone_in(tmp_path, patience=0):
        pass


TASK = """
from dataclasses import replace
from pathlib import Path

from relflat.lab.tasks import TASKS

LOCK = Path(__file__).with_name("unlocked")


def splits(**values):
    made = TASKS["digits"].splits(**values)

    def test():
        if not LOCK.exists():
            raise PermissionError("test labels were read before the final step")
        return made.test()

    return replace(made, test=test)


task = replace(TASKS["digits"], splits=splits)
"""


@pytest.fixture
def locked(tmp_path):
    """A plan on digits whose test labels cannot be read until a file called ``unlocked`` is there."""
    (tmp_path / "locked.py").write_text(TASK)
    values = {**OPTIONS, "seeds": 1, "epochs": 1}
    return study.plan_for(f"{tmp_path / 'locked.py'}:task", ["plain", "fam-radius"], **values)


def test_nothing_is_chosen_by_test_labels(tmp_path, locked):
    """They are unreadable until every trial of the search is over."""
    seen = []

    def on_trial(trial):
        seen.append(trial.config.seed)
        if len(seen) == 4:  # two arms, two settings, one search seed
            (tmp_path / "unlocked").touch()

    study.open_study(tmp_path / "out", locked, tmp_path / "runs", "Notes.")
    comparison, _ = study.carry_out(tmp_path / "out", locked, tmp_path / "runs", 1, on_trial)
    assert seen == [100] * 4 + [0] * 2
    assert all(trials[0].result["test"] for trials in comparison.finals.values())


def test_the_lock_of_that_test_holds(tmp_path, locked):
    with workers(1) as pool, pytest.raises(PermissionError, match="before the final step"):
        study.compare(locked, tmp_path / "runs", pool, lambda trial: None)


def test_report_is_rebuilt_without_training(tmp_path):
    do(tmp_path / "out", tmp_path / "runs", small_plan(seeds=1, epochs=1))
    made = {name: (tmp_path / "out" / name).read_text() for name in FORMS}
    for name in FORMS:
        (tmp_path / "out" / name).unlink()
    (tmp_path / "moved").mkdir()  # runs and report may move together
    (tmp_path / "out").rename(tmp_path / "moved" / "out")
    (tmp_path / "runs").rename(tmp_path / "moved" / "runs")
    study.rebuild(tmp_path / "moved" / "out")
    assert {name: (tmp_path / "moved" / "out" / name).read_text() for name in FORMS} == made
    next((tmp_path / "moved" / "runs").glob("*/result.json")).unlink()
    with pytest.raises(DataError, match=r"1 of \d runs of the comparison"):
        study.rebuild(tmp_path / "moved" / "out")


FORMS = ("report.html", "report.md", "report.csv", "report.tex", "report.json")


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(DataError, match="is not a comparison"):
        study.rebuild(tmp_path)
    study.open_study(tmp_path / "out", small_plan(), tmp_path / "runs", "")
    with pytest.raises(DataError, match="is not finished"):
        study.rebuild(tmp_path / "out")
    with pytest.raises(ConfigError, match="other values of seeds"):
        study.open_study(tmp_path / "out", small_plan(seeds=3), tmp_path / "runs", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Choose another place with --out"):
        study.open_study(tmp_path / "file" / "out", small_plan(), tmp_path / "runs", "")


def test_default_folder_depends_on_the_plan(tmp_path):
    one, other = (study.folder_for(small_plan(seeds=seeds), tmp_path) for seeds in (1, 2))
    assert one != other
    assert one.name.startswith("compare-digits-")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 9}, "trials=9 must lie between 1 and 4"),
        ({"seeds": 0}, "seeds=0 must lie between 1 and 100"),
        ({"search_seeds": 0}, "at least one seed"),
        ({"label_noise": 2.0}, "not a probability"),
    ],
)
def test_impossible_plans_are_rejected(values, message):
    with pytest.raises(ConfigError, match=message):
        small_plan(**values)
