"""``torchrun -m relflat measure``: data shared between processes, one result, the same as of one process."""

import json
import os
import subprocess
import sys

import pytest

from relflat.lab import training
from relflat.lab.config import make
from relflat.lab.measuring import measure_run

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
