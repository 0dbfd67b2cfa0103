import html
import json
import re
from dataclasses import replace

import pytest

from relflat.papers import catalogue as reproduce
from relflat.papers.catalogue import EXPERIMENTS, NAMES
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Table


def paint(axes):
    axes.plot([1, 2], [3, 4])


def outcome(context):
    context.on_progress("one of one")
    return Outcome(
        findings=["Not reproduced: 2 < 3."],
        tables=[Table("Numbers | all", ("what", "value"), (("a|b", "1"),), note="n=1.")],
        figures=[Figure("A line", paint, "It rises.")],
        scaled=["one seed for five"],
        data={"value": float("nan"), "scale": context.scale},
    )


@pytest.fixture
def toy(monkeypatch):
    """One registered experiment that does nothing."""
    experiment = Experiment("toy", "does nothing", "Table 0: 3.", outcome)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"toy": experiment})
    return experiment


def test_the_three_files_have_the_same_words(relflat, toy, tmp_path):
    code, out, err = relflat("reproduce", "toy", "--out", "there")
    assert (code, err) == (0, "")
    assert "Not reproduced: 2 < 3." in out
    assert "there/report.html" in out
    page, text = ((tmp_path / "there" / f"report.{kind}").read_text() for kind in ("html", "md"))
    values = json.loads((tmp_path / "there" / "report.json").read_text())
    for content in (page.replace("&lt;", "<"), text, json.dumps(values)):
        assert "Not reproduced: 2 < 3." in html.unescape(content)
        assert "Table 0: 3." in content
        assert "one seed for five" in content
        assert "n=1." in content
    assert r"a\|b" in text
    assert values["data"] == {"value": None, "scale": "small"}
    assert values["environment"]["packages"]["torch"]
    assert '<svg role="img" aria-label="A line"' in page
    assert "It rises." in page


def test_the_report_needs_no_network(relflat, toy, tmp_path):
    relflat("reproduce", "toy", "--out", "there")
    page = (tmp_path / "there" / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|img)\b|\bsrc=|@import|url\((?!#)", page)
    links = re.findall(r'(?:href)="([^"]*)"', page)
    assert all(link.startswith("#") for link in links)


def test_a_table_that_is_too_wide_is_left_to_the_report(relflat, toy, monkeypatch, tmp_path):
    assert "Numbers | all" in relflat("reproduce", "toy")[1]
    wide = Table("Wide", ("x" * 150, "y" * 150), (("1", "2"),))
    monkeypatch.setattr(
        reproduce,
        "EXPERIMENTS",
        {"toy": Experiment("toy", "", "", lambda context: replace(outcome(context), tables=[wide]))},
    )
    assert "Wide" not in relflat("reproduce", "toy", "--out", "out")[1]
    assert "Wide" in (tmp_path / "out" / "report.md").read_text()


def test_json_is_one_object(relflat, toy):
    code, out, err = relflat("reproduce", "toy", "--scale", "paper", "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert values["folder"] == "runs/reproduce-toy-paper"
    assert values["data"]["scale"] == "paper"


def test_without_a_name_they_are_listed(relflat, toy):
    assert "does nothing" in relflat("reproduce")[1]
    assert json.loads(relflat("reproduce", "--json")[1]) == {"toy": "does nothing"}


def test_an_unknown_name_gets_the_nearest(relflat, tmp_path):
    code, out, err = relflat("reproduce", "tabel1")
    assert (code, out) == (2, "")
    assert "Unknown experiment 'tabel1'; did you mean 'table1'" in err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made(relflat, toy, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = relflat("reproduce", "toy", "--out", "file")
    assert code == 2
    assert "not a report's folder; choose another --out" in err


def test_names_are_those_of_the_modules():
    assert list(EXPERIMENTS) == list(NAMES)
    assert len(EXPERIMENTS) == 8


def test_context_is_silent_by_default(tmp_path):
    Context("small", tmp_path, tmp_path).on_progress("nothing is printed")
