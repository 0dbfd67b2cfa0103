"""``torchrun -m relflat measure``: data shared between processes, one result, the same as of one process."""

import json
import os
import subprocess
import sys

import pytest

from relflat.lab.train import loop as training
from relflat.lab.train.config import make
from relflat.lab.train.measuring import measure_run

TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


@pytest.mark.xdist_group("distributed")
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


def launch(*arguments):
    return subprocess.run(
        (sys.executable, "-m", *TORCHRUN, "-m", "relflat", *arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("algorithm", ["plain", "fam", "sam"])
def test_training_on_two_processes_is_training_on_one(algorithm, tmp_path):
    values = {"task": "digits", "algorithm": algorithm, "epochs": 2, "lr": 0.01}
    alone = training.train(make(values), tmp_path / "alone", tensorboard=False)
    done = launch(
        "train",
        "digits",
        *("--algorithm", algorithm, "--epochs", "2", "--lr", "0.01", "--runs", str(tmp_path), "--name", "two"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["result"]  # one object: one process prints
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


@pytest.mark.xdist_group("distributed")
def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    done = launch("train", "digits", "--batch-size", "31", "--epochs", "1", "--runs", str(tmp_path))
    assert done.returncode != 0
    assert "batch_size=31 cannot be shared evenly by 2 processes" in done.stderr
