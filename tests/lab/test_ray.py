"""The same trials on a Ray cluster of two nodes: bit for bit those of this machine, and no harm in losing a node.

The cluster is of this machine alone: loopback, one CPU a node, small object stores, no dashboard, no statistics.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from relflat.cli.engines import Engine
from relflat.cli.main import main
from relflat.errors import ConfigError
from relflat.integrations.ray import MARK, Shared, versions
from relflat.lab.compare.trials import Job, each, run_job, workers
from relflat.lab.train import store
from relflat.lab.train.config import make

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes Ray keep to the loopback address
    "RAY_memory_monitor_refresh_ms": "0",  # other processes of this machine are none of its business
    "RAY_health_check_period_ms": "500",
    "RAY_worker_niceness": "0",  # 15 by default, which on a busy machine is never
}
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'relflat[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
PATIENCE = 200  # seconds, on a machine that has other things to do
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
TIMES = {"seconds_per_step"}

TASK = """
import os
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from relflat.lab.tasks import TASKS

HERE = Path(__file__).parent


class Slow(nn.Sequential):
    # waits in the middle of the second epoch for as long as a file called ``wait`` is there
    passes = 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == 5 and (HERE / "wait").exists():
            (HERE / f"waiting-{os.getpid()}").touch()
            while (HERE / "wait").exists():
                time.sleep(0.02)
        return super().forward(x)


task = replace(TASKS["digits"], model=lambda: Slow(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
broken = replace(task, model=lambda: 1 / 0)
"""


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; nothing of them is left at the end."""
    made = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        made.add_node(**NODE)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def joined(cluster):
    """This process as a part of the cluster: its workers import the library once for all tests."""
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")


@pytest.fixture
def pool(cluster, joined, tmp_path):
    """The cluster as an engine, and the folder of runs."""
    with Engine(2, "ray", cluster.address).pool(tmp_path / "runs") as engine:
        yield engine


PLAIN, SAM, FAM = {"algorithm": "plain"}, {"algorithm": "sam"}, {"algorithm": "fam"}
PROBES = {**FAM, "layer": "fc*", "method": "probe"}


def jobs_in(runs: Path, *ways: dict, task: str = "digits") -> list[Job]:
    common = {"task": task, "epochs": 3, "train_size": 100}
    return [Job(make({**common, **way}), runs, test=True) for way in ways]


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def numbers(trials):
    return [(trial.config, without_times(trial.result), without_times(trial.history)) for trial in trials]


def test_the_command(cluster, tmp_path, monkeypatch, capsys):
    """A comparison by its command gives the report that the local engine gives, and leaves the cluster."""
    monkeypatch.chdir(tmp_path)
    command = ["compare", "digits", "--arms", "plain", "fam-radius", "--seeds", "2", "--search-seeds", "1"]
    command += ["--trials", "2", "--train-size", "100", "--epochs", "1", "--json"]
    reports = []
    for engine in (["ray", "--address", cluster.address], ["local", "--workers", "1"]):
        main([*command, "--engine", *engine, "--runs", engine[0], "--out", f"out-{engine[0]}"])
        reports.append(json.loads(capsys.readouterr().out))
    assert not ray.is_initialized()
    for report in reports:
        assert report["tested"]["fam-radius"][1]["test"]["loss"] > 0
    ours, theirs = ({key: report[key] for key in ("differences", "search", "tested")} for report in reports)
    assert ours == theirs


def test_trials_are_those_of_this_machine_bit_for_bit(pool, tmp_path):
    seen = []
    found = each(pool, run_job, jobs_in(tmp_path / "runs", PLAIN, SAM, PROBES), seen.append)
    with workers(1) as local:
        expected = each(local, run_job, jobs_in(tmp_path / "local", PLAIN, SAM, PROBES))
    assert len(seen) == 3
    assert numbers(found) == numbers(expected)
    assert found[1].result["test"]["loss"] > 0


def test_a_task_file_that_raises_on_a_worker(pool, tmp_path):
    (tmp_path / "slow.py").write_text(TASK)
    good = jobs_in(tmp_path / "runs", PLAIN)[0]
    bad = jobs_in(tmp_path / "runs", PLAIN, task=f"{tmp_path / 'slow.py'}:broken")[0]
    each(pool, run_job, [good])
    with pytest.raises(ConfigError, match=r"slow\.py raises an error; mend it(.|\n)*ZeroDivisionError") as caught:
        each(pool, run_job, [good, bad])
    assert "ray" not in str(caught.value)
    assert (store.folder_of(good.config, good.runs) / store.RESULT).is_file()


def test_a_worker_that_does_not_see_the_folder(pool, tmp_path):
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"does not see the folder .*runs.*that all machines share"):
        each(pool, run_job, jobs_in(tmp_path / "runs", PLAIN))


def test_a_worker_with_other_versions(tmp_path):
    (tmp_path / MARK).write_text("mark")
    Shared(tmp_path, "mark", versions()).check()
    with pytest.raises(ConfigError, match=r"trials were started with torch 1\. Install the same versions"):
        Shared(tmp_path, "mark", {"torch": "1"}).check()


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_node_lost_in_mid_trial(cluster, pool, tmp_path):
    """Its trial goes on elsewhere after the last finished epoch; what was finished is not done again."""
    (tmp_path / "slow.py").write_text(TASK)
    jobs = jobs_in(tmp_path / "runs", PLAIN, FAM, {**FAM, "seed": 1}, task=f"{tmp_path / 'slow.py'}:task")
    each(pool, run_job, jobs[:1])
    kept = store.folder_of(jobs[0].config, jobs[0].runs) / store.RESULT
    written = kept.stat().st_mtime_ns

    wait = tmp_path / "wait"
    wait.touch()
    done = []
    with ThreadPoolExecutor(1) as beside:
        rest = beside.submit(each, pool, run_job, jobs, done.append)
        try:
            until(lambda: rest.done() or len(list(tmp_path.glob("waiting-*"))) == 2)  # on two nodes of one CPU each
            first_epochs = [metrics(job)[0] for job in jobs[1:]]
            (lost,) = cluster.worker_nodes
            cluster.remove_node(lost, allow_graceful=False)  # kill -9 of all its processes
            until(lambda: len(alive(tmp_path)) == 1)
        finally:
            wait.unlink()
        found = rest.result(timeout=PATIENCE)
    assert kept.stat().st_mtime_ns == written
    assert [metrics(job)[0] for job in jobs[1:]] == first_epochs  # the seconds too: not trained again
    with workers(1) as local:
        expected = each(local, run_job, [replace(job, runs=tmp_path / "local") for job in jobs])
    assert numbers(found) == numbers(expected)
    assert len(done) == 3


def alive(place):
    """The processes that wait in a trial and are still there."""
    numbers = [path.name.split("-")[1] for path in place.glob("waiting-*")]
    return [number for number in numbers if Path(f"/proc/{number}").exists()]


def metrics(job):
    return store.metrics_of(store.folder_of(job.config, job.runs))
