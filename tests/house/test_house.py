"""The source tree stays within its limits (tools/house.py has them): sizes, branches, signatures, circles."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
house: Any = importlib.import_module("house")

REMEDIES = {
    "lines of core": "delete code, or move what is not core",
    "lines of lab + papers": "delete code, or turn it into data",
    "lines of a module": "split it by ideas",
    "lines of a function": "give its parts names",
    "branches of a function": "give its parts names, or make a table of the cases",
    "repeated signatures": "pass one record instead",
    "circles between modules": "move what both need below both",
    "circles between rooms": "move what both need below both",
    "bytes outside src and tests": "keep generated files out of git",
}


@pytest.fixture(scope="module")
def violations() -> dict[str, list[str]]:
    return house.violations(house.Tree(ROOT / "src" / "relflat"), ROOT)


@pytest.mark.parametrize("what", REMEDIES)
def test_limit(violations: dict[str, list[str]], what: str) -> None:
    offenders = violations[what]
    if offenders:
        pytest.fail(f"{what}: {REMEDIES[what]}\n  " + "\n  ".join(offenders), pytrace=False)


def test_every_limit_is_tested(violations: dict[str, list[str]]) -> None:
    assert violations.keys() == REMEDIES.keys()
