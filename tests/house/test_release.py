"""What stands between a tag and a release: tools/release.py on a checkout of a few lines."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
release: Any = importlib.import_module("release")

FILES = {
    "src/relflat/__init__.py": '__version__ = "1.2.0"\n',
    "CITATION.cff": "title: x\nversion: 1.2.0\n",
    "CHANGELOG.md": (
        "# Changelog\n\n## [1.3.0] - unreleased\n\n"
        "## [1.2.0] - 2026-12-01\n\n- New.\n\n## [1.1.0] - 2026-11-01\n\n- Old.\n"
    ),
    "pyproject.toml": '[project.urls]\nRepository = "x://y"\n',
}


def checkout(root: Path, changed: dict[str, str]) -> Path:
    for name, text in {**FILES, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_checkout_that_is_ready(tmp_path) -> None:
    root = checkout(tmp_path, {})
    assert release.problems(root, "v1.2.0", "x://y") == []
    assert release.notes((root / "CHANGELOG.md").read_text(), "1.2.0") == "- New."


@pytest.mark.parametrize(
    ("changed", "tag", "problem"),
    [
        ({}, "v1.2.1", "the tag is v1.2.1"),
        ({"CITATION.cff": "version: 1.1.0\n"}, "v1.2.0", "CITATION.cff does not"),
        ({"CHANGELOG.md": "## [1.2.0] - unreleased\n\n- New.\n"}, "v1.2.0", "CHANGELOG.md has no section"),
        (
            {"CHANGELOG.md": "## [1.2.0] - 2026-12-01\n\n## [1.1.0] - 2026-11-01\n\nx\n"},
            "v1.2.0",
            "CHANGELOG.md has no",
        ),
        ({"pyproject.toml": "[project.urls]\n"}, "v1.2.0", "no Repository"),
    ],
)
def test_what_is_not(tmp_path, changed, tag, problem) -> None:
    (found,) = release.problems(checkout(tmp_path, changed), tag, "x://y")
    assert problem in found
