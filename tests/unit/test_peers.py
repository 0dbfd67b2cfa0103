"""What else is called flatness, against the dense Hessian and against points of the ball itself."""

import math

import pytest
import torch
from torch import nn

from relflat import ConfigError, DataError, LayerError, measures, reference, reparam
from relflat.landscape import layer_spectrum
from relflat.theory.sharpness import kept, rise_within

CE = nn.CrossEntropyLoss


def mlp(between: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), between(), nn.Linear(5, 3)).double()


def data(n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def dense(net: nn.Module, layer: str) -> torch.Tensor:
    loss, W = reference.at_layer(net, CE(), *data(), layer)
    return reference.layer_hessian(loss, W).detach().reshape(W.numel(), W.numel())


class TestSpectrum:
    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_with_all_products_it_is_the_spectrum(self, layer) -> None:
        net, (x, y) = mlp(), data()
        values = torch.linalg.eigvalsh(dense(net, layer))
        cut = list(zip(x.split(7), y.split(7), strict=True))
        found = layer_spectrum(net, CE(), cut, layer=layer, draws=2, max_products=100)
        assert found.size == len(values)
        assert found.top.value == pytest.approx(float(values[-1]), rel=1e-9)
        for ritz, weights in zip(found.values, found.weights, strict=True):
            there = ritz[weights > 1e-8]
            assert float((there[:, None] - values).abs().min(1).values.max()) < 1e-8
            assert float(weights.nansum()) == pytest.approx(1)

    def test_few_products_estimate_the_trace_and_the_moments(self) -> None:
        net, H = mlp(), dense(mlp(), "0")
        found = layer_spectrum(net, CE(), data(), layer="0", draws=200, max_products=3)
        trace = found.trace
        assert trace.value == pytest.approx(float(H.trace()), abs=4 * trace.stderr)
        assert trace.stderr < 0.2 * float(H.square().sum().sqrt()) * 2
        second = found.size * (found.weights * found.values.square()).nansum(1)  # exact to degree 5 for each start
        error = float(second.std()) / math.sqrt(len(second))
        assert float(second.mean()) == pytest.approx(float(H.square().sum()), abs=4 * error)

    def test_its_density_is_one(self) -> None:
        found = layer_spectrum(mlp(), CE(), data(), layer="0", max_products=6)
        at = torch.linspace(-2, 4, 2001, dtype=torch.float64)
        assert float(torch.trapezoid(found.density(at, 0.05), at)) == pytest.approx(1, abs=1e-6)

    def test_in_single_precision_its_error_is_that_precision(self) -> None:
        net, (x, y) = mlp().float(), data()
        top = layer_spectrum(net, CE(), (x.float(), y), layer="2", draws=2, max_products=100).top
        error = abs(top.value - float(torch.linalg.eigvalsh(dense(mlp(), "2"))[-1]))
        assert 0 < error <= 10 * top.stderr < 1e-5

    def test_refused(self) -> None:
        with pytest.raises(LayerError, match="name one"):
            layer_spectrum(mlp(), CE(), data(), layer="*")
        with pytest.raises(DataError, match="Lanczos"):
            layer_spectrum(mlp(), CE(), iter([data()]), layer="0")


def highest_around(net: nn.Module, parameter: nn.Parameter, offsets: torch.Tensor) -> float:
    (x, y), found = data(), []
    start = float(CE()(net(x), y).detach())
    for offset in offsets:
        with kept([parameter]), torch.no_grad():
            parameter += offset.reshape(parameter.shape)
            found.append(float(CE()(net(x), y)) - start)
    return max(found)


def directions() -> torch.Tensor:
    angles = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], 1)


BALLS = {
    "sphere": (0.05, lambda w: 0.05 * directions()),
    "adaptive": (0.5, lambda w: 0.5 * directions() * w.abs()),
    "box": (1e-3, lambda w: 1e-3 * (w.abs() + 1) * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2)),
}


@pytest.mark.parametrize(("ball", "radius", "offsets"), [(name, *of) for name, of in BALLS.items()], ids=BALLS)
def test_the_ascent_finds_the_highest_point_of_the_ball(ball, radius, offsets) -> None:
    """Of two weights, all points around; of a box the corners, as the loss is convex in the weights."""
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False), nn.Linear(2, 3)).double()
    weight, (x, y) = net[1].weight, data()

    def loss_and_gradients():
        loss = CE()(net(x), y)
        return float(loss.detach()), list(torch.autograd.grad(loss, [weight]))

    found = rise_within(ball, radius, [weight], loss_and_gradients, steps=20)
    assert found == pytest.approx(highest_around(net, weight, offsets(weight.detach().flatten())), rel=1e-4)


class TestMeasures:
    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_those_of_the_layer_are_those_of_its_hessian(self, layer) -> None:
        net, H = mlp(), dense(mlp(), layer)
        loss, W = reference.at_layer(net, CE(), *data(), layer)
        found = measures(net, CE(), data(), layer=layer)
        want = {
            "kappa": reference.kappa(loss, W),
            "kappa, largest eigenvalues": reference.max_eigenvalue(loss, W),
            "Tr H": H.trace(),
            "||W||² Tr H": W.square().sum() * H.trace(),
            "lambda_max(H)": torch.linalg.eigvalsh(H)[-1],
            "||W||": W.norm(),
        }
        for name, value in want.items():
            assert found[name].value == pytest.approx(float(value.detach()), rel=1e-4), name
            assert found[name].stderr < 1e-3
        assert list(found)[: len(want)] == list(want)

    def test_sharpness_of_sam_is_at_least_its_own_step(self) -> None:
        """And not more than the largest eigenvalue of the whole Hessian and the gradient allow, to third order."""
        net, (x, y) = mlp(), data()
        before = [p.detach().clone() for p in net.parameters()]
        found = measures(net, CE(), (x, y), steps=3)
        loss = CE()(net(x), y)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p += 0.05 * g / length
            step = float(CE()(net(x), y) - loss)
            for p, was in zip(net.parameters(), before, strict=True):
                p.copy_(was)
        assert step * (1 - 1e-12) <= found["SAM sharpness"].value < 1.5 * step
        assert 0 < found["epsilon-sharpness, %"].value < 100
        assert math.isnan(found["adaptive sharpness"].stderr)

    def test_which_measures_survive_a_rescaling(self) -> None:
        net = mlp(nn.ReLU)
        before = measures(net, CE(), data(), layer="2")
        reparam.rescale_layer(net[0], net[1], net[2], factor=7.0)
        after = measures(net, CE(), data(), layer="2")
        same = [name for name in before if after[name].value == pytest.approx(before[name].value, rel=1e-3)]
        assert same == ["kappa", "kappa, largest eigenvalues", "||W||² Tr H", "adaptive sharpness"]

    def test_it_is_a_table_and_leaves_the_model(self) -> None:
        net = mlp().train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        found = measures(net, CE(), data())
        assert net.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        *lines, below = str(found).splitlines()
        assert [line.split("  ")[0] for line in lines] == ["measure", *found]
        assert below == f"of layer 2, sharpness of all parameters; hessian, loss {found.flat.loss:.5g}, " + (
            f"confidence {found.flat.confidence:.4f}, n={found.flat.samples}"
        )
        assert found._repr_html_().count("<tr>") == 1 + len(found)

    def test_refused(self) -> None:
        with pytest.raises(ConfigError, match="steps=0"):
            measures(mlp(), CE(), data(), steps=0)
        with pytest.raises(ConfigError, match=r"only=\['sharpness'\]"):
            measures(mlp(), CE(), data(), only=["||W||", "sharpness"])
        assert list(measures(mlp(), CE(), data(), only=["||W||"])) == ["||W||"]
        with pytest.raises(LayerError, match="frozen"):
            measures(mlp().requires_grad_(False), CE(), data())
