"""The repository around the code: small, and its forms and targets are what the documents say."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from relflat.lab.compare.arms import arms_named
from relflat.lab.tasks import TASKS

ROOT = Path(__file__).parents[2]
LIMIT = 2_000_000  # bytes outside src and tests
GITHUB = ROOT / ".github"
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_what_is_neither_source_nor_test_stays_small() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked() if not name.startswith(("src/", "tests/"))}
    assert sum(sizes.values()) <= LIMIT, sorted(sizes, key=sizes.__getitem__)[-5:]


def test_generated_reports_are_not_in_git() -> None:
    generated = re.compile(r"docs/study/.*\.(html|csv|tex|json)$")
    assert [n for n in tracked() if generated.match(n)] == ["docs/study/results.json"]


def test_every_make_target_says_what_it_does() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    assert targets == set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    assert targets == set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())


def test_comparisons_of_makefile_and_workflow_are_of_tasks_and_arms_that_there_are() -> None:
    text = (ROOT / "Makefile").read_text() + (GITHUB / "workflows" / "tests.yml").read_text()
    commands = re.findall(r"relflat compare (\S+)(?: .*--arms ([^-]+))?", text)
    assert len(commands) == 4
    for task, arms in commands:
        assert task in TASKS
        assert len(arms_named(arms.split() or ["plain", "fam"])) > 1


@pytest.mark.parametrize("form", ["bug", "feature", "question"])
def test_issue_forms(form: str) -> None:
    found = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= set(found)
    fields = [field for field in found["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_hooks_use_the_projects_own_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].split()[0] in {".venv/bin/ruff", ".venv/bin/mypy", "git"}


def test_supported_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    python = project["requires-python"].removeprefix(">=")
    torch = next(d for d in project["dependencies"] if d.startswith("torch>=")).removeprefix("torch>=")
    assert f"Python {python} and later, torch {torch} and later" in text


def test_rooms_where_things_are_added_exist() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add things")[1].split("\n\n")[1]
    rooms = re.findall(r"`(src/[\w/.]+)`", table)
    assert len(rooms) >= 10
    assert [room for room in rooms if not (ROOT / room).exists()] == []
