"""The figures of the concepts: drawn by the committed script, small, and described where they are shown."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
DRAWN = runpy.run_path(str(FIGURES / "draw.py"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the source distribution leaves pictures out")
def test_every_figure_is_committed_shown_and_described() -> None:
    shown = dict(re.findall(r"!\[([^\]]*)\]\(figures/(\w+)\.svg\)", (ROOT / "docs" / "ten-minutes.md").read_text()))
    assert sorted(shown.values()) == sorted(DRAWN["FIGURES"]) == sorted(p.stem for p in FIGURES.glob("*.svg"))
    assert all(len(alt) > 80 for alt in shown)
    assert max(p.stat().st_size for p in FIGURES.glob("*.svg")) < 60_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("kappa", {"points": 3}),
        ("invariance", {"steps": 1}),
        ("confidence", {}),
        ("penalty", {"sizes": (0.004, 0.016), "seeds": 1}),
    ],
)
def test_every_figure_can_be_drawn(name, small, monkeypatch, tmp_path) -> None:
    draw = DRAWN["FIGURES"][name]
    train = draw.__globals__["train"]
    monkeypatch.setitem(
        draw.__globals__, "train", lambda model, epochs, *rest, **more: train(model, 1, *rest, **more)
    )
    figure = draw(**small)
    figure.savefig(tmp_path / "figure.svg")
    assert all(ax.lines and ax.get_ylabel() for ax in figure.axes)
