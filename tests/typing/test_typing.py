"""A user's typed program passes their type checker, and runs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/typing/script.py"


def run(*command: str) -> str:
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    assert "no layer named 'none'" in capsys.readouterr().out


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    pytest.importorskip("mypy")
    alone = ("--config-file", "tests/typing/mypy.ini", "--cache-dir", ".mypy_cache/typing")
    assert "no issues" in run(sys.executable, "-m", "mypy", *alone, SCRIPT)
