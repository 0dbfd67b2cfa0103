"""The GPU benchmark runs from one end to the other, tiny and on the CPU, so that it will when a GPU is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_step_cost.py"


def test_it_runs_small_on_the_cpu(tmp_path):
    results = tmp_path / "found.json"
    options = ["--device", "cpu", "--small", "--precisions", "fp32", "fp16", "--json", str(results)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not a GPU" in done.stdout
    found = json.loads(results.read_text())
    assert found["device"] == "cpu"
    assert [(r["network"], r["precision"]) for r in found["results"]] == [
        (n, p) for n in ("resnet-18", "vit-s", "bert") for p in ("fp32", "fp16")
    ]
    for result in found["results"]:
        assert result["cannot_run"] == {}
        methods = {row["row"]: row["method"] for row in result["rows"]}
        assert methods["FAM output"] == "closed_form"
        assert methods["FAM hidden frozen"] == "probe(ggn, 1)"
        assert all(row["time"]["seconds"] > 0 for row in result["rows"])
