"""``relflat.suggest`` says what FAM would add: held against FAM itself."""

import pytest
import torch
from torch import nn

from relflat import FAM, ConfigError, suggest

CE = nn.CrossEntropyLoss


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Identity()).double()


def data(n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


@pytest.mark.parametrize("layer", ["output", "*"])
def test_the_penalty_is_that_of_fam_with_its_strength(layer) -> None:
    net, (x, y) = mlp(), data()
    found = suggest(net, CE(), (x, y), layer=layer, size=0.5, every=1)
    n = {"output": 1, "*": 2}[layer]
    assert (len(found.flats), found.strength) == (n, 0.5 / n)
    with FAM(CE(), net, layer, strength=found.strength, method="exact") as criterion:
        criterion(net(x), y)
        last = criterion.last
    assert found.loss == pytest.approx(last["task"], rel=1e-12)
    error = 4 * found.strength * sum(flat.stderr for flat in found.flats.values())
    assert found.penalty == pytest.approx(last["penalty"], rel=1e-9, abs=error)
    assert found.share == pytest.approx(found.penalty / last["task"], rel=1e-12)


def test_a_size_for_a_share_gives_that_share() -> None:
    net, batch = mlp(), data()
    size = suggest(net, CE(), batch).size_for(0.05)
    assert suggest(net, CE(), batch, size=size).share == pytest.approx(0.05, rel=1e-9)


def test_it_says_when_the_bound_holds() -> None:
    net, batch = mlp(), data()
    small, large = suggest(net, CE(), batch), suggest(net, CE(), batch, size=1000.0, bound=0.2)
    assert small.bounded == small.penalty < 0.3 * small.loss
    assert large.bounded == pytest.approx(0.2 * large.loss)
    assert "the bound holds it at 0.2 of the loss" in str(large)
    assert "the bound" not in str(small)
    lines = str(small).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0", "2"]
    assert f"strength {small.strength:.3g}" in lines[3]
    assert "<table>" in small._repr_html_()


@pytest.mark.parametrize("wrong", [{"size": 0.0}, {"bound": -1.0}, {"probes": 0}])
def test_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        suggest(mlp(), CE(), data(), **wrong)
