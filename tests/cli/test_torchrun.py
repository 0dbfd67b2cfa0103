"""``torchrun -m relflat``: data shared between processes, one result, the same as of one process.

Measuring starts ``torchrun`` itself; the others are forked into the environment that it gives to its processes.
"""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from ranks import run

from relflat.cli.main import main
from relflat.lab.train import loop as training
from relflat.lab.train.config import make
from relflat.lab.train.measuring import measure_run

pytestmark = pytest.mark.xdist_group("distributed")
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


def command(rank, *arguments):
    """The exit code, stdout and stderr of the command in a process of its own."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def launch(*arguments):
    """The same of two processes together: the greater code, and all that either wrote."""
    found = run(command, 2, *arguments, group=False)
    assert all(isinstance(each, tuple) for each in found), found
    codes, outs, errs = zip(*found, strict=True)
    return max(codes), "".join(outs), "".join(errs)


@pytest.mark.parametrize("algorithm", ["plain", "fam", "sam"])
def test_training_on_two_processes_is_training_on_one(algorithm, tmp_path):
    values = {"task": "digits", "algorithm": algorithm, "epochs": 2, "lr": 0.01}
    alone = training.train(make(values), tmp_path / "alone", tensorboard=False)
    code, out, err = launch(
        "train",
        "digits",
        *("--algorithm", algorithm, "--epochs", "2", "--lr", "0.01", "--runs", str(tmp_path), "--name", "two"),
        "--json",
    )
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
    code, _, err = launch("train", "digits", "--batch-size", "31", "--epochs", "1", "--runs", str(tmp_path))
    assert code != 0
    assert "batch_size=31 cannot be shared evenly by 2 processes" in err
