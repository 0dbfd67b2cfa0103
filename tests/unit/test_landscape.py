"""The relatives of kappa against the reference and against what they are made of."""

import pytest
import torch
from torch import nn

from relflat import (
    ConfigError,
    LossError,
    feature_robustness,
    max_eigenvalue_flatness,
    per_sample_flatness,
    reference,
    relative_flatness,
    representativeness,
)

CE = nn.CrossEntropyLoss


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n: int = 10, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def cut(x, y, sizes) -> list:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_max_eigenvalue_version(layer: str) -> None:
    net, (x, y) = mlp(), data()
    loss, weight = reference.at_layer(net, CE(), x, y, layer)
    want = float(reference.max_eigenvalue(loss, weight))
    flat = max_eigenvalue_flatness(net, CE(), cut(x, y, [3, 7]), layer=layer, rtol=1e-10)
    assert flat.value == pytest.approx(want, rel=1e-8)
    loose = max_eigenvalue_flatness(net, CE(), (x, y), layer=layer, rtol=0.1)
    assert abs(loose.value - want) <= loose.stderr + 1e-12


@pytest.mark.parametrize("layer", ["2", "4"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_per_sample_values_are_those_of_each_sample_alone(layer: str, reduction: str) -> None:
    net, (x, y) = mlp(), data()
    each = per_sample_flatness(
        net, CE(reduction=reduction), cut(x, y, [3, 7]), layer=layer, method="exact" if layer == "2" else "auto"
    )
    alone = [
        relative_flatness(net, CE(), (a[None], b[None]), layer=layer, method="exact").value
        for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(each, torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_coupled_samples_have_no_shares() -> None:
    net, (x, y) = mlp(), data()
    coupled = lambda z, t: nn.functional.cross_entropy(z, t) ** 2
    with pytest.raises(LossError, match="coupled"):
        per_sample_flatness(net, coupled, (x, y), layer="2", method="exact")


@pytest.mark.parametrize(("layer", "m"), [("2", 6), ("4", 5)])
def test_feature_robustness_tends_to_kappa(layer: str, m: int) -> None:
    net, (x, y) = mlp(), data(40)
    want = relative_flatness(net, CE(), (x, y), layer=layer, method="exact").value
    rise = feature_robustness(net, CE(), cut(x, y, [15, 25]), layer=layer, radius=0.02, draws=400)
    scale = 2 * m / 0.02**2
    assert abs(rise.value * scale - want) < 4 * rise.stderr * scale + 1e-3 * abs(want)
    assert rise.stderr * scale < 0.2 * abs(want)


def test_representativeness_without_blur_is_the_gap() -> None:
    net, train, test = mlp(), data(20), data(30, seed=2)
    gap = float((CE()(net(test[0]), test[1]) - CE()(net(train[0]), train[1])).detach())
    rep = representativeness(net, CE(), cut(*train, [5, 15]), test, layer="2", bandwidth=1e-9)
    assert rep.value == pytest.approx(gap, abs=1e-8)
    blurred = representativeness(net, CE(), cut(*train, [5, 15]), test, layer="2", draws=4)
    assert blurred.value != pytest.approx(gap, abs=1e-4)
    assert blurred.stderr > 0


def test_arguments() -> None:
    net, (x, y) = mlp(), data()
    with pytest.raises(ConfigError, match="radius=0"):
        feature_robustness(net, CE(), (x, y), layer="2", radius=0.0)
