"""The GPU benchmark runs from one end to the other, tiny and on the CPU, so that it will when a GPU is there."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_step_cost.py"


def test_it_runs_small_on_the_cpu(tmp_path, monkeypatch, capsys):
    results = tmp_path / "found.json"
    options = ["--device", "cpu", "--small", "--precisions", "fp32", "fp16", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)  # which the script sets for its process
    before = [place.allow_tf32 for place in places]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed
    assert "not a GPU" in capsys.readouterr().out
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
