"""Every number that the documents quote from a run is the one that was run, rounded as it is printed."""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from quotes import QUOTES, Quote

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "study"
sys.path.append(str(STUDIES))
import picture  # noqa: E402

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
    *(ROOT / "docs" / "study" / name for name in ("README.md", "fashion-mnist.md")),
]
NUMBER = re.compile(r"(?:(?<![\w.])[-+−])?(?<![\w.])(?:\d+\.\d+|\.\d+|\d+)(?:e-?\d+)?")
WHOLE = ("docs/study/README.md", "docs/study/fashion-mnist.md")  # pages of nothing but results
SECTIONS = {
    "README.md": ("## What it buys", "## What it costs"),
    "docs/benchmarks.md": ("## What it buys",),
    "docs/tasks.md": ("## Measured",),
    "docs/compare.md": ("## Arms",),
}
STEP = {"value": "ratio", "low": "low", "high": "high"}
HERE = "https://github.com/relflat/relflat/blob/main/"
# numbers of the papers, of the tasks and of statistics
OTHER = re.compile(
    r"paper has [+\d. to%]+|strength 3e6|\(\.35 for|20 to 40 %|SGD 0\.05|momentum 0\.9|weight decay 5e-4|torch [\d.]+"
    r"|bar of \.90|error of \.0028|stays above \.99|rho 0\.1\b|\(commit \w+|\d+²"
)


def _slug(text: str) -> str:
    return re.sub(r"[ ,]+", "-", text)


@cache
def arms_of(source: str) -> dict[str, dict[str, Any]]:
    """Arm -> metric -> value of a study, or of a file of benchmarks/results."""
    if not source.startswith("benchmarks/"):
        return json.loads((ROOT / "docs" / "study" / "results.json").read_text())[source]["arms"]
    found = json.loads((ROOT / "benchmarks" / "results" / f"{Path(source).name}.json").read_text())
    groups = found.get("results", [found])
    rows = [row for group in reversed(groups) for row in group["rows"]]  # of equal names the first network's
    return {
        _slug("/".join(filter(None, (row.get("case"), row["row"])))): {
            "flops": {"value": row.get("flops_ratio", row.get("flops"))},
            "peak": {"value": row.get("peak")},
            "error": {"value": row.get("median_error")},
            "step": {key: row.get("wall", {}).get(name) for key, name in STEP.items()},
            **{key: {"value": row.get(key)} for key in ("beyond_2", "beyond_4", "rms", "gib")},
            **{f"rmse_{budget}": {"value": cell["rmse"]} for budget, cell in row.get("cells", {}).items()},
        }
        for row in rows
    }


def values(source: str, metrics: str) -> list[float | None]:
    """The numbers that ``arm metric metric.sd; arm metric`` names; None for ``_``."""
    found: list[float | None] = []
    for part in metrics.split("; "):
        arm, *names = part.split()
        if arm == "_":
            found.append(None)
        for name in names:
            metric, _, key = name.partition(".")
            entry = None if name == "_" else arms_of(source)[arm][metric]
            found.append(entry[key or "value"] if isinstance(entry, dict) else entry)
    return found


def agrees(printed: str, value: float) -> bool:
    """The value, or a hundred times it (percent, points), rounds to what is printed."""
    number = printed.replace("−", "-")
    mantissa, _, exponent = number.partition("e")
    _, point, decimals = mantissa.partition(".")
    zeros = 0 if point else len(mantissa) - len(mantissa.rstrip("0"))
    step = 10.0 ** (int(exponent or 0) + zeros - len(decimals))
    return any(abs(scale * value - float(number)) <= 0.5 * step + 2e-6 * abs(scale * value) for scale in (1, 100))


def pattern(words: str) -> re.Pattern[str]:
    """The words, however the lines break; ``…`` for others on the line."""
    parts = (r"\s+".join(map(re.escape, part.split())) for part in words.split("…"))
    return re.compile(r"[^\n]*?\s*".join(parts))


@pytest.mark.parametrize(
    ("page", "quote"),
    [pytest.param(page, quote, id=f"{page}: {quote[0]}") for page, quotes in QUOTES.items() for quote in quotes],
)
def test_quoted_numbers_are_those_of_the_run(page: str, quote: Quote) -> None:
    words, source, metrics = quote
    assert pattern(words).search((ROOT / page).read_text()), f"{page} no longer says so: adapt tests/docs/quotes.py"
    printed, wanted = NUMBER.findall(words), values(source, metrics)
    assert len(printed) == len(wanted), (printed, wanted)
    for number, value in zip(printed, wanted, strict=True):
        assert value is None or agrees(number, value), f"{page} prints {number}; {source} has {value}"


def passages(page: str, text: str) -> list[str]:
    """The parts of a page that speak of results: whole pages, sections, and whatever links to a study."""
    if page in WHOLE:
        return [text]
    found = []
    for section in SECTIONS.get(page, ()):
        rest = text[text.index(f"\n{section}\n") + len(section) + 2 :]
        found.append(re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0])
        text = text.replace(found[-1], "")
    blocks = re.split(r"\n\s*\n|\n(?=[|-] ?)", text)
    return found + [block for block in blocks if re.search(rf"\]\((?:{HERE})?(?:\.\./|docs/)?study/.*\.md", block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_number_is_left_without_a_run(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    text = re.sub(r"^```.*?^```|^    .*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for passage in passages(name, text):
        for words, *_ in QUOTES.get(name, []):
            passage = pattern(words).sub("", passage)
        passage = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", OTHER.sub("", passage))
        left = [n for n in NUMBER.findall(passage) if "." in n or n[0] in "+-−"]
        assert left == [], f"{name} quotes {left}: say in tests/docs/quotes.py which run they are from"


@pytest.mark.parametrize(
    ("printed", "value", "same"),
    [
        ("+1.3", 0.0132, True),
        ("+1.3", 0.0136, False),
        (".031", 0.03125, True),
        ("−.0018", -0.00176667, True),
        ("0.4", -0.004, False),
        ("160", 161.8, True),
        ("2e-15", 1.8e-15, True),
        ("2e-15", 1.4e-15, False),
    ],
)
def test_rounding(printed: str, value: float, same: bool) -> None:
    assert agrees(printed, value) is same


def test_the_picture_shows_untuned_comparisons_where_there_are_any() -> None:
    results = {"a": {"search_seeds": [100]}, "b": {"search_seeds": []}, "c": {}}
    assert list(picture.comparisons(results)) == ["b"]
    tuned = {name: {"search_seeds": [100]} for name in picture.TUNED}
    assert list(picture.comparisons(tuned | results | {"b": {}})) == list(picture.TUNED)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the source distribution leaves pictures out")
def test_the_picture_is_of_the_results(tmp_path: Path) -> None:
    def shown(path: Path) -> list[str]:
        """Names, numbers beside the axes, and how many points there are."""
        return [*re.findall("<text[^>]*>([^<]*)<", path.read_text()), str(path.read_text().count("<use "))]

    picture.main(tmp_path / "picture.svg")
    assert shown(tmp_path / "picture.svg") == shown(STUDIES / "picture.svg"), "draw it again: make results"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the source distribution leaves pictures out")
def test_committed_pictures_are_small_and_described() -> None:
    pages = sorted((ROOT / "docs" / "study").rglob("*.md"))
    shown = {
        (page.parent / target).resolve(): alt
        for page in pages
        for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text())
    }
    pictures = [p for kind in ("svg", "png") for p in (ROOT / "docs" / "study").rglob(f"*.{kind}")]
    assert set(pictures) == set(shown)
    assert all(len(alt) > 20 for alt in shown.values())
    assert max(p.stat().st_size for p in pictures) < 75_000  # ten panels
    assert sum(p.stat().st_size for p in pictures) < 450_000
