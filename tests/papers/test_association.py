import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr

from relflat.errors import DataError
from relflat.papers.association import associate, pearson, tau


def pairs(n=12, seed=0):
    random = np.random.default_rng(seed)
    x = random.integers(0, 6, n).astype(float)  # with ties
    return x, x + random.normal(0, 2, n).round()


def test_coefficients_are_those_of_scipy():
    x, y = pairs()
    found = associate(x, y)
    assert found.tau.value == pytest.approx(kendalltau(x, y).statistic)
    assert found.r.value == pytest.approx(pearsonr(x, y).statistic)
    assert found.n == 12


def test_a_resample_counts_its_pairs_as_often_as_they_were_drawn():
    x, y = pairs()
    drawn = np.random.default_rng(1).integers(0, 12, (5, 12))
    counts = np.stack([np.bincount(row, minlength=12) for row in drawn]).astype(float)
    for row, one, other in zip(drawn, tau(x, y, counts), pearson(x, y, counts), strict=True):
        assert one == pytest.approx(kendalltau(x[row], y[row]).statistic)
        assert other == pytest.approx(pearsonr(x[row], y[row]).statistic)


def test_the_interval_is_narrow_around_a_clear_association_and_wide_around_none():
    random = np.random.default_rng(3)
    x, noise = random.normal(size=60), random.normal(size=60)
    clear, none = associate(x, x + 0.2 * noise), associate(x, noise)
    assert clear.tau.sign == 1
    assert associate(x, -x - 0.2 * noise).tau.sign == -1
    assert none.tau.sign == 0
    assert none.tau.low < none.tau.value < none.tau.high
    assert clear.tau.high - clear.tau.low < none.tau.high - none.tau.low


def test_the_interval_covers_as_often_as_it_says():
    """The true r of these pairs is .6; 95 % intervals of 40 pairs should miss it in about 5 % of 200 samples."""
    random = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        x = random.normal(size=40)
        r = associate(x, 0.6 * x + 0.8 * random.normal(size=40)).r
        missed += not r.low <= 0.6 <= r.high
    assert 2 <= missed <= 26


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 2, 3], [1.0, 2]), ([1, 2, float("nan")], [1, 2, 3])]
)
def test_what_cannot_be_correlated_is_an_error(x, y):
    with pytest.raises(DataError, match=r"at least three pairs|finite"):
        associate(x, y)


def test_a_constant_has_no_coefficient_and_no_sign():
    found = associate([1.0, 1, 1, 1], [1.0, 2, 3, 4])
    assert np.isnan(found.tau.value)
    assert found.tau.sign == 0
