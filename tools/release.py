"""python tools/release.py v1.2.3: is this checkout what the tag says? Prints the changelog's section of it."""

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(changelog: str, version: str) -> str | None:
    """The section of a version that has a date; None where there is none."""
    found = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## \[|\Z)", changelog, re.M | re.S
    )
    return found and found[1].strip()


def problems(root: Path, tag: str, address: str | None) -> list[str]:
    """What has to be mended before this tag may be published; ``address`` is where the repository is."""
    version = re.search(r'^__version__ = "(.+)"$', (root / "src/relflat/__init__.py").read_text("utf-8"), re.M)
    assert version is not None
    found = []
    if tag != f"v{version[1]}":
        found.append(f"the tag is {tag} and src/relflat/__init__.py has {version[1]}")
    if f"\nversion: {version[1]}\n" not in (root / "CITATION.cff").read_text("utf-8"):
        found.append(f"CITATION.cff does not have version: {version[1]}")
    if not notes((root / "CHANGELOG.md").read_text("utf-8"), version[1]):
        found.append(f"CHANGELOG.md has no section '## [{version[1]}] - YEAR-MONTH-DAY' with a text")
    urls = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    if address is not None and urls.get("Repository") != address:
        found.append(f'[project.urls] of pyproject.toml has no Repository = "{address}"')
    return found


def main() -> None:
    """Check, and print the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag")
    parser.add_argument("--address", help="of the repository, which [project.urls] must have")
    given = parser.parse_args()
    if found := problems(ROOT, given.tag, given.address):
        sys.exit("\n".join(["not published:", *found]))
    print(notes((ROOT / "CHANGELOG.md").read_text("utf-8"), given.tag.removeprefix("v")))


if __name__ == "__main__":
    main()
