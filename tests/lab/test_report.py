import csv
import io
import json
import math
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from synthetic import COSTS, comparison

from relflat.cli.compare import show
from relflat.lab.compare.arms import ARMS
from relflat.lab.compare.statistics import Difference
from relflat.lab.report import document, drawing, figures, study
from relflat.lab.report.figures import merged_bins
from relflat.lab.report.formats import named, number, percent
from relflat.lab.report.report import files
from relflat.lab.report.summary import Summary
from relflat.lab.report.verdict import at_the_edge, findings, verdict
from relflat.lab.train import store
from relflat.lab.train.environment import describe
from relflat.papers.association import associate
from relflat.plot.style import short

PLAIN = [0.80, 0.81, 0.82, 0.80, 0.81, 0.82, 0.80]
CLEAR = [PLAIN, [x + 0.1 + k / 1000 for k, x in enumerate(PLAIN)], [x - 0.05 for x in PLAIN]]
UNCLEAR = [PLAIN, [0.79, 0.83, 0.81, 0.80, 0.82, 0.81, 0.80], [0.82, 0.80, 0.81, 0.81, 0.80, 0.82, 0.79]]


def written(one, notes="Notes."):
    return files(Summary(one, COSTS), describe(), notes)


def page(scores, **options):
    return written(comparison(scores, **options), "What was run & how.")["report.html"]


@pytest.fixture(scope="module")
def clear():
    """The files of one report."""
    return written(comparison(CLEAR), "What was run & how.")


def test_verdict_names_what_is_shown():
    texts = verdict(Summary(comparison(CLEAR), COSTS).differences)
    assert texts[0].startswith("SAM is better than plain: +10.3 points")
    assert texts[1].startswith("FAM radius is worse than plain: -5.0 points")


def test_verdict_may_be_no_difference_shown():
    texts = verdict(Summary(comparison(UNCLEAR), COSTS).differences)
    assert len(texts) == 2
    assert all("no difference shown" in text for text in texts)


def test_verdict_says_first_when_the_seeds_are_too_few_to_show_anything():
    texts = verdict(Summary(comparison([scores[:3] for scores in CLEAR]), COSTS).differences)
    assert "With 3 seeds this test can show nothing" in texts[0]
    assert "--seeds 7" in texts[0]
    assert len(texts) == 3
    assert all("no difference shown" in text for text in texts[1:])


def test_verdict_gives_the_cost_where_it_is_known():
    one = comparison(CLEAR)
    texts = findings(Summary(one, COSTS))
    assert texts[0].endswith("7 seeds), at 2.00x the step.")
    assert texts[1].endswith("7 seeds), at 1.05x the step.")
    assert "the step" not in "".join(verdict(Summary(one, COSTS).differences))


@pytest.mark.parametrize(
    ("low", "high", "p", "n", "why"),
    [
        (-0.02, -0.002, 0.19, 5, True),
        (0.002, 0.02, 0.19, 12, True),
        (-0.02, 0.002, 0.19, 5, False),
        (-0.02, -0.002, 0.03, 5, False),
        (-math.inf, math.inf, 1.0, 1, False),
    ],
)
def test_an_interval_that_leaves_out_0_without_significance_is_explained(low, high, p, n, why):
    (text,) = verdict([Difference("plain", "SAM", (low + high) / 2, low, high, p, 0.01, n)])
    assert ("p decides" in text) is why
    assert ("too narrow with few seeds, so p decides" in text) is (why and n < 10)


def test_arms_are_called_by_their_names_on_the_command_line_where_titles_differ():
    shown = {name: named(arm.title, name) for name, arm in ARMS.items()}
    assert shown["fam-one"] == "FAM a layer a step (fam-one)"
    assert shown["fam-frozen"] == "FAM frozen"
    one = comparison(CLEAR)
    arms = tuple(replace(arm, title={"sam": "Sharpness"}.get(arm.name, arm.title)) for arm in one.plan.arms)
    forms = all_forms(replace(one, plan=replace(one.plan, arms=arms)))
    assert "| Sharpness (sam) |" in forms["markdown"]
    assert "Sharpness (sam)  rho 0.4" in forms["terminal"]
    assert "validation at equal time, %" in forms["markdown"]


def test_the_title_of_an_own_task_is_what_it_calls_itself(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom relflat.lab.tasks import TASKS\n"
        "same = TASKS['digits']\nmine = replace(same, name='[my] <digits>')\n"
    )
    one = comparison(CLEAR)
    forms = all_forms(replace(one, plan=replace(one.plan, task=f"{path}:mine")))
    assert r"help on \[my\] &lt;digits\>?" in forms["markdown"]
    assert "[my] <digits>, 20 % label noise" in forms["terminal"]
    assert "help on [my] &lt;digits&gt;?" in forms["html"]
    forms = all_forms(replace(one, plan=replace(one.plan, task=f"{path}:same")))
    assert "help on mine-same?" in forms["markdown"]


def test_remarks_name_edges_divergence_and_what_radius_is():
    one = comparison(CLEAR)
    text = " ".join(findings(Summary(one, COSTS)))
    assert "adds noise to the features" in text
    assert "end of its grid" not in text  # a grid of two values has no inside
    arms = tuple(replace(arm, values=(*arm.values[:1], 0.2, *arm.values[1:])) for arm in one.plan.arms)
    wide = replace(one, plan=replace(one.plan, arms=arms))
    assert at_the_edge(wide) == ["plain", "SAM", "FAM radius"]


def test_accuracy_at_equal_time_counts_the_epochs_that_fit():
    one = comparison(CLEAR)
    plain, sam, radius = Summary(one, COSTS).rows
    assert sam.equal_time[0] == pytest.approx(sam.score[0] - 0.1)  # half of two epochs
    assert plain.equal_time[0] == pytest.approx(plain.score[0])
    assert radius.equal_time[0] == pytest.approx(radius.score[0])  # 1.05x is within noise


def test_numbers_show_the_digits_that_the_deviation_supports():
    assert number((15.123, 0.62)) == "15.1 ± 0.6"
    assert number((0.7761, 0.021)) == "0.78 ± 0.02"
    assert number((153.2, 21.0)) == "153 ± 21"
    assert number((1.234, math.nan)) == "1.23"
    assert number((math.nan, math.nan)) == percent((math.nan, math.nan)) == "–"
    assert percent((0.9123, math.nan)) == "91.2"


def test_diverged_seed_is_counted_and_left_out_of_pairs():
    one = comparison(CLEAR, lost=[(2, 1)])
    line = Summary(one, COSTS).rows[2]
    assert (line.arm, line.n, line.diverged) == ("fam-radius", 6, 1)
    assert {pair.n for pair in Summary(one, COSTS).differences} == {6}
    assert "6 (+1 diverged)" in page(CLEAR, lost=[(2, 1)])


def test_each_sentence_of_the_verdict_says_which_table_it_speaks_of():
    one, other = comparison(CLEAR), comparison(UNCLEAR)
    usual = replace(other, plan=replace(other.plan.usual, arms=other.plan.usual.arms))
    forms = all_forms(replace(one, untuned=usual))
    for name in ("html", "markdown", "terminal"):
        text = " ".join(forms[name].split())
        assert "Tuned: SAM is better than plain: +10.3 points" in text
        assert "Untuned: SAM against plain: no difference shown" in text
    assert "## Results, untuned" in forms["markdown"]
    assert "| SAM | 90.6 ± 1.3" not in forms["markdown"].split("## Results, untuned")[0]
    assert json.loads(forms["json"])["untuned"]["differences"][0]["second"] == "SAM"


def with_corruptions(one, keep=7):
    """The same with accuracies under a corruption, half of those without, in the first so many runs of each arm."""
    finals = {}
    for name, trials in one.finals.items():
        accuracies = [each.result["test"]["accuracy"] / 2 for each in trials]
        finals[name] = [
            replace(
                each,
                result={**each.result, "corrupted": {"noise": [{"accuracy": half}] * 2}}
                if place < keep
                else each.result,
            )
            for place, (each, half) in enumerate(zip(trials, accuracies, strict=True))
        ]
    return replace(one, finals=finals)


def test_what_the_test_split_shows_beyond_accuracy():
    text = all_forms(with_corruptions(comparison(CLEAR)))["markdown"].split("## Beyond accuracy, tuned")[1]
    assert "| arm | test loss | ECE, % | confidence, % | noise, % |" in text
    row = next(line for line in text.splitlines() if line.startswith("| SAM "))
    assert "0.088 ± 0.009 -0.103 (-0.105 to -0.101)" in row  # the loss is made up: one minus the accuracy
    assert "45.6 ± 0.5 +5.1 (+5.1 to +5.2)" in row
    assert "| 67.5 ± 0.0 +0.0 (+0.0 to +0.0) |" in row  # half of the samples at .4, half at .95
    assert "older version" not in text


def test_runs_of_an_older_version_lack_corruptions_and_the_report_says_so():
    text = all_forms(comparison(CLEAR))["markdown"]
    assert "21 runs were tested by an older version, without corruptions" in text
    assert "noise, %" not in text
    text = all_forms(with_corruptions(comparison(CLEAR), keep=3))["markdown"]
    assert "12 runs were tested by an older version" in text
    assert "nan" not in text


def test_a_recipe_is_stated():
    one = comparison(CLEAR)
    common = {**one.plan.common, "recipe_smoothing": 0.1, "recipe_dropout": 0.0}
    forms = all_forms(replace(one, plan=replace(one.plan, common=common, in_recipe=("smoothing", "dropout"))))
    said = "Every arm has the same recipe under it: label smoothing 0.1, dropout 0.0 (as given)."
    assert said in forms["markdown"]
    assert "Left out, as part of it: smoothing, dropout." in forms["markdown"]
    assert "under every arm: label smoothing 0.1, dropout 0.0" in forms["terminal"]


def test_the_report_says_how_many_settings_each_arm_tried():
    assert "each on search seeds 100: plain 2, SAM 2, FAM radius 2." in all_forms(comparison(CLEAR))["markdown"]


def test_calibration_of_several_runs_is_merged():
    (share, confidence, right), (_, high, best) = merged_bins(comparison(CLEAR).finals["plain"])
    assert (share / 7, confidence, right) == pytest.approx((0.5, 0.4, 0.5))
    assert (high, best) == pytest.approx((0.95, sum(PLAIN) / 7))


def test_markdown_csv_and_latex_hold_the_same_table(clear):
    lines = Summary(comparison(CLEAR), COSTS).rows
    text = clear["report.md"]
    assert "| SAM | 91.2 ± 0.9 | +10.3 (+10.1 to +10.5) | 7 |" in text
    assert "SAM is better than plain" in text
    table = list(csv.DictReader(io.StringIO(clear["report.csv"])))
    assert [row["arm"] for row in table] == ["plain", "sam", "fam-radius"]
    assert float(table[1]["accuracy_mean"]) == lines[1].score[0]
    assert table[1]["settings"] == "rho=0.4"
    tex = clear["report.tex"]
    assert r"SAM & 91.2 $\pm$ 0.9 & +10.3 (+10.1 to +10.5) & 7" in tex
    assert r"accuracy, \%" in tex
    assert tex.count(r"\\") == 4


def test_page_needs_nothing_from_outside(clear):
    text = clear["report.html"]
    links = re.findall(r'(?:src|href|url\()\s*=?\s*["\']?([^"\'\s)>]+)', text)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in text
    assert "What was run &amp; how." in text


def test_page_is_well_formed_and_its_ids_are_unique(clear):
    class Check(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.ids = [], []

        def handle_starttag(self, tag, attributes):
            self.ids += [value for name, value in attributes if name == "id"]
            if tag not in {"meta", "br"}:
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            self.ids += [value for name, value in attributes if name == "id"]

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    check = Check()
    check.feed(clear["report.html"])
    assert check.open == []
    assert len(check.ids) == len(set(check.ids)) > 20


def test_references_inside_figures_resolve(clear):
    text = clear["report.html"]
    targets = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= targets


def test_figures_follow_light_and_dark_mode(clear):
    text = clear["report.html"]
    assert text.count('<svg role="img" aria-label=') == 9
    for name in ("ink", "lines", "c0", "c1", "c2"):
        assert f"var(--{name})" in text
        assert text.count(f"--{name}:") == 2  # once for each mode
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", figures)  # no colour but those of the page


def test_the_first_figure_shows_gain_beside_cost():
    """The arms at the ratio of their steps and the gain of the table, in the look of what is shown or not."""
    summary = Summary(comparison(CLEAR), COSTS)
    axes = Figure().add_subplot()
    figures.gain_against_cost(summary).paint(axes)
    found = {h.get_label(): h for h in axes.get_legend_handles_labels()[0]}
    for pair in summary.differences:
        marker, _, (bar,) = found[pair.second]
        cost = COSTS[next(arm.name for arm in summary.comparison.arms if arm.title == pair.second)].ratio
        assert marker.get_xydata().tolist() == [[cost, 100 * pair.mean]]
        np.testing.assert_allclose(bar.get_segments()[0][:, 1], [100 * pair.low, 100 * pair.high])
        assert (marker.get_markerfacecolor() == "none") is not pair.shown
    assert figures.gain_against_cost(Summary(comparison(CLEAR, lost=EVERY, unsearched=True), COSTS)) is None


def test_figures_are_files_that_markdown_shows(clear):
    shown = re.findall(r"!\[(.+)\]\((.+)\)", clear["report.md"])
    assert len(shown) == 9
    assert {name for _, name in shown} == {name for name in clear if name.endswith(".svg")}
    for label, name in shown:
        assert ElementTree.fromstring(clear[name]).tag.endswith("svg")
        assert "var(" not in clear[name]  # viewers other than browsers know no CSS variables
        assert f'aria-label="{label}"' in clear["report.html"]


def test_the_page_escapes_whatever_it_shows():
    text = "<b>&\"'"
    table = document.Table("", [text], [[text]], text)
    figure = document.Figure(text, lambda axes: axes.set_title(text), text)
    section = document.Section(text, text, [text], table, [figure])
    environment = describe() | {"processor": text}
    found = document.Document(text, text, [section, section], environment, text).files()["report.html"]
    assert "<b>" not in found
    assert found.count("&lt;b&gt;&amp;") == 5 + 2 * 10  # of the page, and of each section


def test_an_own_figure_is_one_function(monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", [])

    @figures.register
    def losses(summary):
        groups = {line.title: ([line.kappa[0]], [line.loss[0]]) for line in summary.rows}
        return document.Figure("Kappa & loss", drawing.points(groups, ("kappa", "loss")), "Means.")

    forms = written(comparison(CLEAR))
    assert "Kappa &amp; loss" in forms["report.html"]
    assert "kappa-loss.svg" in forms


def test_same_results_give_the_same_page():
    one = comparison([scores[:3] for scores in CLEAR])
    where = describe()
    assert files(Summary(one, COSTS), where, "") == files(Summary(one, COSTS), where, "")


# -- few seeds, nothing finished -----------------------------------------------------------------------------

EVERY = [(arm, seed) for arm in range(3) for seed in range(7)]


def all_forms(one):
    """The report in every form, as text; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        console = Console(width=120, record=True, quiet=False, file=io.StringIO())
        summary = Summary(one, COSTS)
        show(summary, console)
        forms = files(summary, describe(), "Notes.")
        return {
            "html": forms["report.html"],
            "markdown": forms["report.md"],
            "csv": forms["report.csv"],
            "latex": forms["report.tex"],
            "terminal": console.export_text(),
            "json": json.dumps(store.as_json(study.numbers(summary)), allow_nan=False),
        }


def no_such_number(text):
    """What stands for a number that there is none of, left in a text; figures have numbers of their own."""
    return re.findall(
        r"(?i)(?<![\w-])[-+±]? ?(?:nan|inf)(?:inite|inity)?(?!\w)",
        re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL),
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_said_in_every_form(seeds):
    one = comparison([scores[:seeds] for scores in CLEAR])
    forms = all_forms(one)
    assert [name for name, text in forms.items() if no_such_number(text)] == []
    assert "± nan" not in "".join(forms.values())
    for name in ("html", "markdown", "terminal"):
        text = " ".join(forms[name].split())
        assert ("n = 1: no spread" in text) is (seeds == 1)
        assert f"With {seeds} seed{'s' * (seeds > 1)} this test can show nothing" in text
    assert ("| SAM | 90.0 | +10.0 (n = 1) | 1 |" in forms["markdown"]) is (seeds == 1)
    assert bool(re.search(r"SAM .* \(\+10\.0 to \+10\.1\) & 2", forms["latex"])) is (seeds == 2)
    table = list(csv.DictReader(io.StringIO(forms["csv"])))
    assert (table[1]["accuracy_sd"] == "") is (seeds == 1)


def test_a_report_of_diverged_runs_has_no_warning_and_no_nan():
    forms = all_forms(comparison(CLEAR, lost=EVERY, unsearched=True))
    assert [name for name, text in forms.items() if no_such_number(text)] == []
    assert "Nothing can be compared: on every seed some arm diverged." in forms["markdown"]
    assert "of plain, SAM, FAM radius there was no setting without, and the first was tested" in forms["markdown"]
    assert "| plain | – |  | 0 (+7 diverged) | – |" in forms["markdown"]
    assert forms["html"].count("nothing to show") == 7  # all figures but calibration, which is left out


def test_an_arm_that_never_finished_is_not_in_the_figures():
    text = page(CLEAR, lost=[(1, seed) for seed in range(7)])
    first = re.search(r"<svg.*?</svg>", text, re.DOTALL)
    assert first is not None
    assert "FAM radius" in first[0]
    assert ">SAM<" not in first[0]


def test_a_coefficient_that_does_not_exist_is_a_dash():
    same = associate([1.0, 1.0, 1.0], [0.1, 0.2, 0.3])
    assert (str(same.tau), str(same.r)) == ("–", "–")


# -- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 7, len(ARMS)])
def test_the_legend_lies_within_the_figure_and_leaves_the_axes_their_room(count):
    names = [arm.title for arm in ARMS.values()][-count:]
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure(figsize=(drawing.WIDTH, drawing.HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            axes.plot([1, 2], [3 + place, 4], label=name)
        drawing.legend(axes)
        FigureCanvasAgg(figure).draw()
        legend = axes.get_legend()
        assert legend is not None
        box, page = legend.get_window_extent(), figure.bbox
        assert box.x0 >= 0
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
        assert axes.bbox.width > 0.75 * page.width
        assert axes.bbox.height > 0.7 * drawing.HEIGHT * figure.dpi
    rows = legend_rows(legend)
    assert [name for row in rows for name in row] == names  # read row by row


def legend_rows(legend):
    """The texts of a legend, by line from the top and from left to right."""
    found = {}
    for text in legend.get_texts():
        box = text.get_window_extent()
        found.setdefault(round(-box.y0 / 5), []).append((box.x0, text.get_text()))
    return [[name for _, name in sorted(line)] for _, line in sorted(found.items())]


def test_every_arm_looks_different():
    lines = {(str(drawing.marks(place)), drawing.dashes(place)) for place in range(len(ARMS))}
    assert len(lines) == len(ARMS)
    points = {str(drawing.marks(place)) for place in range(18)}
    assert len(points) == 18


def test_numbers_beside_an_axis_are_short():
    assert [short(value) for value in (0.5, 9999, 2e4, 5e5, 1e6)] == ["0.5", "9999", "20k", "500k", "1e+06"]
