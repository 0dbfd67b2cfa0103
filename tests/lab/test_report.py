import re
from html.parser import HTMLParser

from synthetic import COSTS, comparison

from relflat.lab.environment import describe
from relflat.lab.report import render
from relflat.lab.statistics import differences
from relflat.lab.summary import accuracy_differences as compared
from relflat.lab.summary import remarks, rows, sentence, verdict

CLEAR = {"plain": [0.80, 0.81, 0.82], "sam": [0.90, 0.911, 0.92], "fam": [0.85, 0.861, 0.869]}
UNCLEAR = {"plain": [0.80, 0.81, 0.82], "sam": [0.79, 0.83, 0.81], "fam": [0.82, 0.80, 0.81]}


def page(scores, **options):
    return render(comparison(scores, **options), COSTS, describe(), "What was run & how.")


def test_verdict_names_what_is_shown():
    texts = verdict(compared(comparison(CLEAR)))
    assert texts[0].startswith("SAM is better than plain: +10.0 points")
    assert texts[1].startswith("FAM is better than plain: +5.0 points")
    assert texts[2].startswith("FAM is worse than SAM: -5.0 points")


def test_verdict_may_be_no_difference_shown():
    texts = verdict(compared(comparison(UNCLEAR)))
    assert len(texts) == 3
    assert all("no difference shown" in text for text in texts)


def test_interval_and_p_value_agree():
    for scores in (CLEAR, UNCLEAR):
        for pair in differences(scores):
            outside = pair.low > 0 or pair.high < 0
            if outside:
                assert pair.shown
            assert sentence(pair).count("seeds") == 1


def test_remarks_say_when_the_chosen_fam_is_not_kappa():
    one = comparison(CLEAR)
    text = " ".join(remarks(one, rows(one, COSTS)))
    assert "So few seeds" in text
    assert "finite radius" in text
    assert "with kappa itself reached 80.0 % on validation data, the chosen one 90.0 %" in text


def test_diverged_seed_is_counted_and_left_out_of_pairs():
    one = comparison(CLEAR, lost=("fam", 1))
    assert [(line.method, line.n, line.diverged) for line in rows(one, COSTS)][2] == ("fam", 2, 1)
    assert {pair.n for pair in compared(one)} == {2}
    assert "2 (+1 diverged)" in page(CLEAR, lost=("fam", 1))


def test_page_needs_nothing_from_outside():
    text = page(CLEAR)
    links = re.findall(r'(?:src|href|url\()\s*=?\s*["\']?([^"\'\s)>]+)', text)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in text
    assert "What was run &amp; how." in text


def test_page_is_well_formed_and_its_ids_are_unique():
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
    check.feed(page(CLEAR))
    assert check.open == []
    assert len(check.ids) == len(set(check.ids)) > 20


def test_references_inside_figures_resolve():
    text = page(CLEAR)
    targets = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= targets


def test_figures_follow_light_and_dark_mode():
    text = page(CLEAR)
    assert text.count('<svg role="img" aria-label=') == 5
    for name in ("ink", "lines", "plain", "sam", "fam"):
        assert f"var(--{name})" in text
        assert text.count(f"--{name}:") == 2  # once for each mode
    assert not re.search(r"#0a0\d0\d|#010101|#020202", text)


def test_same_results_give_the_same_page():
    one = comparison(CLEAR)
    where = describe()
    assert render(one, COSTS, where, "") == render(one, COSTS, where, "")
