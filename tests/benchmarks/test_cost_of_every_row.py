"""The script that measures every row runs from one end to the other, tiny and on the CPU."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cost


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "only"), [("cpu", "ResNet"), ("cuda", "fp16"), ("cuda", "BERT")])
def test_it_runs_small_on_the_cpu(tmp_path, cases: str, only: str) -> None:
    results = tmp_path / "found.json"
    cost.main(["--cases", cases, "--small", "--only", only, "--threads", "1", "--json", str(results)])
    found = json.loads(results.read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert not [row for row in rows.values() if "cannot_run" in row]
    assert list(rows)[:7] == ["plain", "plain again", "SAM", "output", "all", "all, every 4", "one drawn, every 4"]
    assert rows["output"]["method"] == "closed_form"
    assert all(row["wall"]["seconds"] > 0 for row in rows.values())
    assert ("by default" in rows) == (only == "ResNet")
    assert results.with_suffix(".svg").exists()
