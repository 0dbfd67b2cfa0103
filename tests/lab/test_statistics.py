import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from relflat.errors import DataError
from relflat.lab.statistics import differences, holm, mean_sd, paired

scores = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8)


@given(scores)
def test_paired_agrees_with_scipy(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    gaps = [y - x for x, y in pairs]
    if max(gaps) - min(gaps) < 1e-6:
        return
    expected = ttest_rel(b, a)
    found = paired("a", "b", a, b)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_equal_gaps_are_not_taken_for_certainty():
    assert paired("a", "b", [0.5] * 3, [0.75] * 3).p == 0.25
    assert paired("a", "b", [0.5] * 3, [0.5] * 3).p == 1.0


def test_one_seed_shows_nothing():
    only = paired("a", "b", [0.5], [0.9])
    assert only.p == 1.0
    assert not only.shown
    assert math.isnan(mean_sd([0.5])[1])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_all_pairs_are_compared():
    found = differences({"plain": [0.1, 0.2], "sam": [0.3, 0.5], "fam": [0.2, 0.4]})
    assert [(pair.first, pair.second) for pair in found] == [
        ("plain", "sam"),
        ("plain", "fam"),
        ("sam", "fam"),
    ]
    with pytest.raises(DataError, match="same seeds"):
        differences({"plain": [0.1], "sam": [0.3, 0.5]})
