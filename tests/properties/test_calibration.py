"""Standard errors are honest: estimates of many seeds lie as far from the exact value as they say.

``benchmarks/calibration.py`` is the whole table, on fourteen trained networks; here are the hardest of it and less.
"""

import copy
import functools
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relflat import relative_flatness
from relflat.measure.sums import Sum

CE = nn.CrossEntropyLoss()


def trained(*which: Any) -> tuple[nn.Module, Any]:
    """A network that has learnt its samples, so that few of them hold most of kappa."""
    model, data = _trained(*which)
    return copy.deepcopy(model), data


@functools.cache
def _trained(samples: int, classes: int, activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x = torch.randn(samples, 8).double()
    y = (x @ torch.randn(8, classes).double()).argmax(1)
    model = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, classes))
    model = model.double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def distances(model: nn.Module, data: Any, seeds: int, layer: str = "2", **options: Any) -> Tensor:
    """From the exact value, in standard errors."""
    curvature = options.setdefault("curvature", "hessian")
    true = relative_flatness(model, CE, data, layer="2", curvature=curvature, method="exact").value
    found = [relative_flatness(model, CE, data, layer=layer, seed=s, **options) for s in range(seeds)]
    return torch.tensor([(f.value - true) / f.stderr for f in found])


METHODS: dict[str, dict[str, Any]] = {
    "probe": {"method": "probe"},
    "probe, ggn": {"method": "probe", "curvature": "ggn"},
    "probe, in weight": {"method": "probe", "layer": "2.weight"},
    "probe, few": {"method": "probe", "probes": 4},
    "xtrace": {"method": "xtrace"},
    "finite_difference": {"method": "finite_difference"},
}


@pytest.mark.parametrize("method", METHODS)
def test_on_trained_networks(method: str) -> None:
    model, data = trained(24, 3, nn.Tanh if method == "finite_difference" else nn.ReLU)
    seeds = 30 if method == "finite_difference" else 60
    z = distances(model, data, seeds, **METHODS[method])
    assert float((z.abs() > 2).double().mean()) <= 0.08
    assert float(z.abs().max()) < 4
    assert abs(float(z.mean())) < 0.5
    assert float(z.square().mean()) > 0.1  # not so large that they say nothing


def test_a_single_sample_of_two_classes_whose_curvature_has_one_direction() -> None:
    """Shares are chi squared of one degree of freedom: where the value is low, so is any estimate of its error."""
    model, (x, y) = trained(24, 2)
    with torch.no_grad():
        unsure = int(model(x).softmax(1).amin(1).argmax())
    z = distances(model, (x[[unsure]], y[[unsure]]), 200, method="probe")
    assert float((z.abs() > 2).double().mean()) <= 0.07
    assert float(z.abs().max()) < 5


def test_the_spread_of_few_shares_is_widened_and_that_of_many_groups_is_not() -> None:
    torch.manual_seed(0)
    few, many = torch.randn(2000, 4, 1).square(), torch.randn(300, 4, 200).square()
    for shares, groups in ((few, 1), (many, 200)):
        sums = [Sum.of(v, exact=False) for v in shares]
        z = torch.tensor([(s.value - groups) / s.error for s in sums])
        assert float((z.abs() > 2).double().mean()) < 0.09
    assert float(z.square().mean()) > 0.7
    one, two = sums[0], sums[1]
    both = one * 0.5 + two * 0.5
    assert both.error < 0.8 * min(one.error, two.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite_differences_state_rounding_and_truncation(dtype: torch.dtype, scale: float) -> None:
    """A large constant in the loss costs digits, in every probe alike, which the spread of probes does not show."""
    model, (x, y) = trained(24, 3, nn.Tanh)
    loss = lambda z, t: CE(z, t) + scale
    true = relative_flatness(model, loss, (x, y), layer="2", method="exact").value
    model, x = model.to(dtype), x.to(dtype)
    options = {"layer": "2", "method": "finite_difference", "probes": 8}
    for seed in range(8):
        found = relative_flatness(model, loss, (x, y), seed=seed, **options)
        assert abs(found.value - true) < 3 * found.stderr
    assert (found.stderr > abs(true)) == (scale == 1e4 and dtype == torch.float32)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 4e-4), (torch.float64, 1e-6)])
def test_a_step_of_finite_differences_is_as_long_as_the_precision_asks(dtype: torch.dtype, off: float) -> None:
    """One weight, so that every direction is the same; the loss is its exponential, whose derivatives are known."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.constant_(model[0].weight, 0.7)
    for seed in range(8):
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
        loss = lambda z, _: z.exp().mean()
        found = relative_flatness(model, loss, (x, x), layer="0", method="finite_difference", curvature="hessian")
        along = 0.7 * x.double()
        assert found.value == pytest.approx(float((along.square() * along.exp()).mean()), rel=off)


def test_the_error_of_two_probes_does_not_hang_on_how_near_they_come() -> None:
    """Two values have a standard deviation that is off by three quarters of itself; that of their images is not."""
    model, (x, y) = trained(24, 3, nn.Tanh)
    options = {"layer": "2", "method": "probe", "probes": 2}
    errors = [relative_flatness(model, CE, (x, y), seed=seed, **options).stderr for seed in range(30)]
    assert stdev(errors) < 0.42 * mean(errors)


def test_a_kink_in_the_middle_of_a_step_shows_in_the_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-9]]))
    x = torch.tensor([[1.0, -1.0]]).double()  # both units are at their kink
    found = relative_flatness(model, nn.L1Loss(), (x, x[:, :1] + 9), layer="0", method="finite_difference")
    assert found.stderr > 0.3 * abs(found.value)
