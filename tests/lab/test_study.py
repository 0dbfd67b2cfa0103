"""A comparison on disk: killed and resumed, reported again, and blind to test labels while it chooses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

import pytest
from killable import end, start

from processes import python
from relflat.cli.options import Budget
from relflat.cli.plan import plan_for
from relflat.errors import ConfigError, DataError
from relflat.lab.compare.trials import workers
from relflat.lab.report import study
from relflat.lab.train import store
from relflat.lab.train.store import alone_in

OPTIONS = {"seeds": 2, "search_seeds": 1, "trials": 2, "train_size": 100, "epochs": 3, "label_noise": 0.1}
TIMES = {"seconds_per_step", "cost", "environment", "step", "equal_time"}


def small_plan(**values):
    return plan_with(["plain", "fam-radius"], **{**OPTIONS, **values})


def plan_with(arms, task="digits", **values):
    budget = {field.name: values.pop(field.name) for field in fields(Budget) if field.name in values}
    return plan_for(task, arms, Budget(**budget), **values)


def do(folder, runs, plan, processes=1):
    study.open_study(folder, plan, runs, "Notes.")
    return study.carry_out(folder, plan, runs, processes, lambda trial: None).comparison


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


COMMAND = ["compare", "digits", "--arms", "plain", "fam-radius", "--seeds", "2", "--search-seeds", "1"]
COMMAND += [
    "--trials",
    "2",
    "--train-size",
    "100",
    "--epochs",
    "3",
    "--label-noise",
    "0.1",
    "--workers",
    "1",
    "--json",
]
KILLS = 10


@dataclass
class Study:
    """A comparison in a folder of its own, by its command."""

    place: Path

    def start(self, fatal=0):
        self.place.mkdir(exist_ok=True)
        ways = ["--runs", str(self.place / "runs"), "--out", str(self.place / "out")]
        return start([*COMMAND, *ways], self.place / "log", self.place, fatal)

    def finish(self):
        """Seconds and changes of files that an uninterrupted command takes."""
        begin = time.monotonic()
        assert end(self.start()) == 0, (self.place / "log").read_text()
        return time.monotonic() - begin, int((self.place / "log").read_text().rpartition("changes: ")[2])

    def numbers(self):
        """Everything that is left, except times: the names of all files, and what is in those with numbers."""
        files = {path.relative_to(self.place): path for path in self.place.rglob("*") if path.name != "log"}
        return sorted(files), {name: content(path) for name, path in files.items() if path.is_file()}


def content(path):
    if path.name in {"report.json", "result.json", "plan.json", "config.json"}:
        return without_times(store.read_json(path))
    if path.name == "metrics.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes() if path.name == "model.safetensors" else None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted comparison: its seconds, its changes of files, what is left of it."""
    study = Study(tmp_path_factory.mktemp("whole"))
    return *study.finish(), study.numbers()


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("moment", ["in time", "between writes"])
def test_killed_ten_times_and_resumed_it_gives_the_same_numbers(whole, tmp_path, moment):
    """Kill -9 at random moments; what comes out equals the uninterrupted comparison, bit for bit."""
    seconds, changes, expected = whole
    chance = random.Random(moment)
    killed = 0
    for attempt in count():
        one = Study(tmp_path / str(attempt))
        while killed < KILLS:
            share = chance.uniform(0, 2 / KILLS)
            if moment == "in time":
                process = one.start()
                time.sleep(share * seconds)
                process.kill()
            else:
                process = one.start(fatal=1 + int(share * changes))
            code = end(process)
            if code == 0:  # all done before it could be killed: another one
                break
            assert code == -signal.SIGKILL, (one.place / "log").read_text()
            killed += 1
        one.finish()
        assert one.numbers() == expected
        if killed == KILLS:
            return


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_finished_runs_are_not_done_twice(tmp_path):
    one = Study(tmp_path / "one")
    process = one.start()
    while len(done := list(one.place.glob("runs/*/result.json"))) < 3:
        time.sleep(0.005)
    process.kill()
    assert end(process) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in done}
    one.finish()
    assert {path: path.stat().st_mtime_ns for path in done} == before


@pytest.mark.xdist_group("bare")
def test_workers_end_when_their_parent_is_killed():
    code = (
        "import os, signal\n"
        "from relflat.lab.compare.trials import workers\n"
        "pool = workers(2)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = python(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_is_answered_at_once_in_a_line(tmp_path):
    """As a terminal sends it: to all processes of the command."""
    arms = ["--arms", "plain", "sam", "--workers", "2", "--trials", "0", "--seeds", "4", "--epochs", "1000"]
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # else deaf where tests are
    code = f"{heard}; from relflat.cli.entry import main; main()"
    line = [sys.executable, "-c", code, "compare", "digits", *arms, "--runs", "runs", "--out", "out"]
    with subprocess.Popen(line, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True) as command:
        try:
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2 and command.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(command.pid, signal.SIGINT)
            said = command.communicate(timeout=60)[1].splitlines()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == 130
    assert said[-1] == "error: interrupted; the same command goes on after the last finished epoch."
    assert not [each for each in said if "Traceback" in each or "Error" in each]


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
    return plan_with(["plain", "fam-radius"], f"{tmp_path / 'locked.py'}:task", **values)


def test_nothing_is_chosen_by_test_labels(tmp_path, locked):
    """They are unreadable until every trial of the search is over."""
    seen = []

    def on_trial(trial):
        seen.append(trial.config.seed)
        if len(seen) == 4:  # two arms, two settings, one search seed
            (tmp_path / "unlocked").touch()

    study.open_study(tmp_path / "out", locked, tmp_path / "runs", "Notes.")
    comparison = study.carry_out(tmp_path / "out", locked, tmp_path / "runs", 1, on_trial).comparison
    assert seen == [100] * 4 + [0] * 2
    assert all(trials[0].result["test"] for trials in comparison.finals.values())


def test_the_lock_of_that_test_holds(tmp_path, locked):
    with workers(1) as pool, pytest.raises(ConfigError, match=r"PermissionError: .* before the final step"):
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
    with pytest.raises(ConfigError, match="choose another place with --out"):
        study.open_study(tmp_path / "file" / "out", small_plan(), tmp_path / "runs", "")


def test_default_folder_depends_on_the_plan(tmp_path):
    one, other = (study.folder_for(small_plan(seeds=seeds), tmp_path) for seeds in (1, 2))
    assert one != other
    assert one.name.startswith("compare-digits-")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 9}, "trials=9 must lie between 0 and 4"),
        ({"seeds": 0}, "seeds=0 must lie between 1 and 100"),
        ({"search_seeds": 0}, "search_seeds=0 must be above 0"),
        ({"label_noise": 2.0}, "not a probability"),
    ],
)
def test_impossible_plans_are_rejected(values, message):
    with pytest.raises(ConfigError, match=message):
        small_plan(**values)
