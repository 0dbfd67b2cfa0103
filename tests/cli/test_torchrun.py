"""``torchrun -m relflat``: data shared between processes, one result, the same as of one process.

Measuring starts ``torchrun`` itself; the others are forked into the environment that it gives to its processes.
"""

import json
import math
import os
import subprocess
import sys

import pytest

from processes import relflat
from relflat.lab.train import loop as training
from relflat.lab.train.config import make
from relflat.lab.train.measuring import measure_run

pytestmark = pytest.mark.xdist_group("processes")
TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


def test_measure_on_two_processes(tmp_path):
    run = tmp_path / "run"
    training.train(make({"task": "digits", "epochs": 1}), run, test=False, tensorboard=False)
    (expected,) = measure_run(run).values()
    done = subprocess.run(
        (sys.executable, "-m", *TORCHRUN, "-m", "relflat", "measure", str(run), "--json"),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == expected.samples
    for key in ("value", "trace", "loss", "confidence"):
        assert found[key] == pytest.approx(getattr(expected, key), rel=1e-6)


@pytest.mark.parametrize("algorithm", ["plain", "fam", "sam"])
def test_training_on_two_processes_is_training_on_one(algorithm, tmp_path):
    settings = (
        {"strength": 0.1, "bound": math.inf} if algorithm == "fam" else {}
    )  # each process has a bound of its own
    values = {"task": "digits", "algorithm": algorithm, "epochs": 2, "lr": 0.01, **settings}
    alone = training.train(make(values), tmp_path / "alone", tensorboard=False)
    way = ("--algorithm", algorithm, "--epochs", "2", "--lr", "0.01", "--runs", str(tmp_path), "--name", "two")
    way += tuple(str(x) for key, value in settings.items() for x in (f"--{key}", value))
    code, out, err = relflat("train", "digits", *way, "--json", ranks=2)
    assert code == 0, err
    found = json.loads(out)["result"]  # one object: one process prints
    assert found["steps"] == alone["steps"]
    for split in ("train", "validation", "test"):
        assert found[split]["loss"] == pytest.approx(alone[split]["loss"], rel=1e-4)
    assert found["flatness"]["value"] == pytest.approx(alone["flatness"]["value"], rel=1e-4)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "two")
    ]
    for one, two in zip(*lines, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["penalty"] == pytest.approx(one["penalty"], rel=1e-4)


def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    code, _, err = relflat("train", "digits", "--batch-size", "31", "--epochs", "1", "--runs", str(tmp_path), ranks=2)
    assert code != 0
    assert "batch_size=31 cannot be shared evenly by 2 processes" in err
