import math
from itertools import product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from relflat.errors import DataError
from relflat.lab.compare.statistics import bca, differences, holm, least_p, mean_sd, seeds_needed, sign_flip

gaps = st.lists(st.integers(-20, 20).map(lambda k: k / 100), min_size=2, max_size=7)


@given(gaps)
def test_sign_flip_counts_all_signs(values):
    """Written out: the share of sign patterns whose mean is at least as far from zero."""
    wanted = abs(sum(values)) - 1e-9
    patterns = list(product((-1, 1), repeat=len(values)))
    share = sum(abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= wanted for signs in patterns)
    assert sign_flip(values) == pytest.approx(share / len(patterns))


def test_least_p_is_reached_by_gaps_of_one_sign():
    for n in (2, 3, 6, 9):
        assert sign_flip([0.01 * (k + 1) for k in range(n)]) == pytest.approx(least_p(n))
    assert least_p(1) == 1


def test_seeds_needed_is_the_first_number_that_can_show_anything():
    assert seeds_needed(1) == 6  # 2 / 2**6 = 0.031
    assert seeds_needed(3) == 7


def test_equal_gaps_are_not_taken_for_certainty():
    found = differences({"a": [0.5] * 3, "b": [0.75] * 3})[0]
    assert found.p == 0.25
    assert found.low == found.high == 0.25
    assert differences({"a": [0.5] * 3, "b": [0.5] * 3})[0].p == 1.0


def test_one_seed_shows_nothing():
    only = differences({"a": [0.5], "b": [0.9]})[0]
    assert only.p == 1.0
    assert (only.low, only.high) == (-math.inf, math.inf)
    assert not only.shown
    assert math.isnan(mean_sd([0.5])[1])


def test_bca_interval_is_near_students_for_many_normal_gaps():
    values = np.random.default_rng(0).normal(1.0, 2.0, 200).tolist()
    low, high = bca(values, 0.95)
    half = student.ppf(0.975, 199) * np.std(values, ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=0.05)
    assert bca(values, 0.95) == (low, high)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_arm_is_held_against_the_first():
    found = differences({"plain": [0.1, 0.2], "sam": [0.3, 0.5], "fam": [0.2, 0.4]})
    assert [(pair.first, pair.second) for pair in found] == [("plain", "sam"), ("plain", "fam")]
    assert found[0].mean == pytest.approx(0.25)
    with pytest.raises(DataError, match="same seeds"):
        differences({"plain": [0.1], "sam": [0.3, 0.5]})
