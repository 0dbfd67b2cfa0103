"""Some of several layers in each step: unbiased, reproducible, and no deeper than drawn."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from relflat import ConfigError
from relflat.rng import subset
from unbounded import FAM

CE = nn.CrossEntropyLoss
NAMES = ["1", "4", "7", "9"]


class Watched(torch.autograd.Function):
    """The identity, which counts gradients that come back through it."""

    arrived = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        Watched.arrived += 1
        return gradient


class Mark(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Watched.apply(x)


def network() -> nn.Sequential:
    """A gradient for the layer before a mark passes it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Identity(),
        nn.Linear(4, 6),
        Mark(),
        nn.Tanh(),
        nn.Linear(6, 6),
        Mark(),
        nn.Tanh(),
        nn.Linear(6, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=g, dtype=torch.float64), torch.randint(3, (8,), generator=g)


def penalised(net: nn.Module, **options) -> tuple[list[Tensor], dict]:
    """Loss and gradients of the first step, and its report."""
    x, y = batch()
    with FAM(CE(), net, NAMES, strength=0.7, seed=3, **options) as fam:
        loss = fam(net(x), y)
        return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))], fam.last


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient": "frozen"}, {"gradient": "weights"}, {"curvature": "hessian", "method": "exact"}],
    ids=str,
)
def test_the_average_over_all_subsets_is_the_whole(size: int, options: dict, monkeypatch) -> None:
    net = network()
    whole, report = penalised(net, **options)
    parts = []
    for drawn in itertools.combinations(range(4), size):
        monkeypatch.setattr("relflat.fam.subset", lambda *_, drawn=drawn: list(drawn))
        values, part = penalised(net, layers_per_step=size, **options)
        parts.append(values)
        assert part["layers"] == [NAMES[i] for i in drawn] == list(part["by_layer"])
        assert part["kappa"] == pytest.approx(sum(part["by_layer"].values()) * 4 / size, rel=1e-12)
        for name, kappa in part["by_layer"].items():
            assert kappa == pytest.approx(report["by_layer"][name], rel=1e-12)
    assert len(parts) == math.comb(4, size)
    for full, each in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(each).mean(0), full, rtol=1e-10, atol=1e-13)


def test_the_stated_variance(monkeypatch) -> None:
    net, n, k = network(), 4, 2
    _, report = penalised(net)
    sums = []
    for drawn in itertools.combinations(range(n), k):
        monkeypatch.setattr("relflat.fam.subset", lambda *_, drawn=drawn: list(drawn))
        sums.append(penalised(net, layers_per_step=k)[1]["kappa"])
    between = torch.tensor(list(report["by_layer"].values())).var()
    assert torch.tensor(sums).var(correction=0) == pytest.approx(float(n * (n - k) / k * between), rel=1e-5)


@pytest.mark.parametrize(("drawn", "crossed"), [([3], 0), ([2], 0), ([1], 1), ([0], 2), ([0, 2], 2)])
def test_the_pull_back_stops_at_the_deepest_layer_drawn(drawn, crossed, monkeypatch) -> None:
    net, (x, y) = network(), batch()
    monkeypatch.setattr("relflat.fam.subset", lambda *_: drawn)
    fam = FAM(CE(), net, NAMES, strength=0.7, layers_per_step=len(drawn))
    fam(net(x), y)  # coupling between samples is asked for once a layer
    out = net(x)
    Watched.arrived = 0
    fam(out, y)
    assert Watched.arrived == crossed


def test_all_of_them_is_the_same_to_the_bit() -> None:
    net = network()
    a, _ = penalised(net)
    b, _ = penalised(net, layers_per_step=4)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_seed_and_step_determine_the_draw() -> None:
    net, (x, y) = network(), batch()

    def run(start: int, steps: int, seed: int = 5) -> list[tuple]:
        fam = FAM(CE(), net, NAMES, strength=0.7, layers_per_step=2, seed=seed)
        fam.step, seen = start, []
        for _ in range(steps):
            fam(net(x), y)
            seen.append((tuple(fam.last["layers"]), fam.last["kappa"]))
        return seen

    whole = run(0, 12)
    assert whole[5:] == run(5, 7)
    assert len({names for names, _ in whole}) > 3
    assert run(0, 12, seed=6) != whole


def test_draws_are_uniform_and_the_same_on_all_ranks(monkeypatch) -> None:
    draws = [tuple(subset(0, step, 4, 2)) for step in range(3000)]
    counts = [draws.count(pair) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 3000
    assert all(abs(c - 500) < 4 * math.sqrt(500 * 5 / 6) for c in counts)
    monkeypatch.setattr("relflat.rng._rank", lambda: 1)
    assert [tuple(subset(0, step, 4, 2)) for step in range(50)] == draws[:50]


def test_a_penalty_for_a_loss_and_a_parameter() -> None:
    net, (x, y) = network(), batch()
    fam = FAM(None, net, ["4", "7.weight"], strength=0.7, layers_per_step=1, seed=0)
    seen = set()
    for _ in range(12):
        fam.penalty(CE()(net(x), y))
        assert fam.last["layers"] == list(fam.last["by_layer"])
        seen.update(fam.last["layers"])
    assert seen == {"4", "7.weight"}


def test_finite_differences_take_the_drawn_layers_only() -> None:
    net, (x, y) = network(), batch()
    fam = FAM(
        CE(), net, NAMES, strength=0.7, layers_per_step=1, curvature="hessian", method="finite_difference", seed=0
    )
    fam(net(x), y)
    assert len(fam.last["by_layer"]) == 1


def test_refusals() -> None:
    net = network()
    for wrong, needed in (
        (0, "a whole number of layers from 1 on"),
        (5, "a number from 1 to 4"),
        (-1, "a whole number"),
    ):
        with pytest.raises(ConfigError, match=rf"layers_per_step={wrong}: {needed}"):
            FAM(CE(), net, NAMES, strength=1.0, layers_per_step=wrong)
    with pytest.raises(ConfigError, match=r"layers_per_step has no meaning with radius=0\.1"):
        FAM(CE(), net, NAMES, strength=1.0, radius=0.1, layers_per_step=1)
    fam, (x, y) = FAM(CE(), net, "output", strength=1.0, layers_per_step=2), batch()
    with pytest.raises(ConfigError, match="a number from 1 to 1"):
        fam(net(x), y)
    assert not net[1]._forward_hooks
