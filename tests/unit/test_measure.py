"""relative_flatness as a user meets it: what it takes, what it leaves alone, what it says."""

import math

import pytest
import torch
from torch import nn

from relflat import (
    ConfigError,
    DataError,
    LayerError,
    LossError,
    NonFiniteError,
    reference,
    relative_flatness,
    relative_flatness_by_layer,
)

CE = nn.CrossEntropyLoss


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()


def data(n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def cut(x, y, sizes) -> list:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


class TestLeavesAlone:
    @pytest.mark.parametrize("method", ["auto", "probe", "finite_difference"])
    def test_modes_gradients_buffers_and_random_numbers(self, method: str) -> None:
        net, (x, y) = mlp(), data()
        net.train()
        net[3].eval()
        net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        rng = torch.get_rng_state()
        relative_flatness(net, CE(), (x, y), layer="4", method=method, probes=2)
        assert torch.equal(rng, torch.get_rng_state())
        assert [m.training for m in net] == [True, True, True, False, True, True, True]
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert torch.equal(net[0].weight.grad, torch.full_like(net[0].weight, 7.0))
        assert net[4].weight.grad is None

    def test_works_under_no_grad_and_with_a_frozen_model(self) -> None:
        net, (x, y) = mlp(), data()
        want = relative_flatness(net, CE(), (x, y), layer="4", method="exact").value
        net.requires_grad_(False)
        with torch.no_grad():
            assert relative_flatness(net, CE(), (x, y), layer="4", method="exact").value == want


class TestTakes:
    def test_one_tuple_a_list_a_loader_and_mappings_agree(self) -> None:
        class Named(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, pixels):
                return {"logits": self.net(pixels)}

        net, (x, y) = mlp(), data()
        want = relative_flatness(net, CE(), (x, y), layer="output")
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        named = [{"pixels": a, "labels": b} for a, b in cut(x, y, [3, 7])]
        for flat in (
            relative_flatness(net, CE(), cut(x, y, [1, 9]), layer="output"),
            relative_flatness(net, CE(), loader, layer="output"),
            relative_flatness(net, CE(), iter(cut(x, y, [5, 5])), layer="output"),
            relative_flatness(
                Named(net), CE(), named, layer="output", forward=lambda m, b: (m(b["pixels"])["logits"], b["labels"])
            ),
        ):
            assert flat.value == pytest.approx(want.value, rel=1e-12)
            assert flat.samples == 10
            assert flat.loss == pytest.approx(want.loss, rel=1e-12)
            assert flat.confidence == pytest.approx(want.confidence, rel=1e-12)
            assert flat.trace == pytest.approx(want.trace, rel=1e-12)
            assert flat.method == "closed_form"

    def test_an_unknown_loss_over_batches_of_any_size(self) -> None:
        net, (x, y) = mlp(), data()
        for reduction in ("mean", "sum"):
            loss_fn = lambda z, t, r=reduction: nn.functional.nll_loss(z.log_softmax(-1), t, reduction=r)
            want = relative_flatness(net, loss_fn, (x, y), layer="4", method="exact").value
            for sizes in ([1] * 10, [3, 7], [9, 1]):
                got = relative_flatness(net, loss_fn, cut(x, y, sizes), layer="4", method="exact").value
                assert got == pytest.approx(want, rel=1e-10)

    def test_a_loss_that_does_not_add_up_is_refused_unless_in_one_batch(self) -> None:
        net, (x, y) = mlp(), data()
        loss_fn = lambda z, t: nn.functional.cross_entropy(z, t).exp()
        with pytest.raises(LossError, match="neither the mean nor the sum"):
            relative_flatness(net, loss_fn, cut(x, y, [5, 5]), layer="4", method="exact")
        closure, weight = reference.at_layer(net.eval(), loss_fn, x, y, "4")
        got = relative_flatness(net, loss_fn, (x, y), layer="4", method="exact").value
        assert got == pytest.approx(float(reference.kappa(closure, weight)), rel=1e-9)


class TestError:
    def test_stderr_covers_the_truth_as_often_as_it_should(self) -> None:
        net, (x, y) = mlp(), data(40)
        exact = relative_flatness(net, CE(), (x, y), layer="4", method="exact")
        z = []
        for seed in range(60):
            flat = relative_flatness(net, CE(), (x, y), layer="4", method="probe", probes=8, seed=seed)
            z.append((flat.value - exact.value) / flat.stderr)
        z = torch.tensor(z)
        assert z.abs().max() < 5
        assert 0.7 < float(z.std()) < 1.4
        assert abs(float(z.mean())) < 0.5

    def test_rtol_draws_until_the_error_is_small_enough(self) -> None:
        net, (x, y) = mlp(), data(40)
        exact = relative_flatness(net, CE(), (x, y), layer="4", method="exact", curvature="ggn").value
        flat = relative_flatness(
            net, CE(), cut(x, y, [20, 20]), layer="4", method="probe", curvature="ggn", probes=4, rtol=0.01
        )
        assert 0 < flat.stderr <= 0.01 * flat.value
        assert abs(flat.value - exact) < 5 * flat.stderr
        assert int(flat.method.split()[-1].rstrip(")")) > 4

    def test_rtol_out_of_reach(self) -> None:
        net, (x, y) = mlp(), data(2)
        with pytest.raises(ConfigError, match=r"rtol=1e-07 is out of reach.*exact"):
            relative_flatness(net, CE(), (x, y), layer="4", method="probe", probes=1024, rtol=1e-7)

    def test_one_probe_has_no_error_estimate(self) -> None:
        net, (x, y) = mlp(), data()
        assert math.isnan(relative_flatness(net, CE(), (x, y), layer="4", method="probe", probes=1).stderr)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_finite_differences_agree_on_a_smooth_network(self, adaptive: bool) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = data()
        exact, flat = (
            relative_flatness(net, CE(), (x, y), layer="0", method=method, probes=800, adaptive=adaptive)
            for method in ("exact", "finite_difference")
        )
        assert abs(flat.value - exact.value) < 4 * flat.stderr
        assert flat.stderr < (2e-3 if adaptive else 0.2 * abs(exact.value))


class TestSeveral:
    def test_by_layer(self) -> None:
        net, (x, y) = mlp(), data()
        found = relative_flatness_by_layer(net, CE(), (x, y), layer=["0", "4", "6"], method="exact")
        assert list(found) == ["0", "4", "6"]
        alone = relative_flatness(net, CE(), (x, y), layer="4", method="exact")
        assert found["4"] == alone

    def test_one_is_asked_for_and_several_match(self) -> None:
        net, (x, y) = mlp(), data()
        with pytest.raises(LayerError, match=r"matches \['0', '4', '6'\].*by_layer"):
            relative_flatness(net, CE(), (x, y), layer="*")


class TestNormalizeFeatures:
    def test_equals_the_rescaled_layer_and_needs_two_passes(self) -> None:
        net, (x, y) = mlp(), data()
        net.eval()
        phi = net[:6](x).detach()
        std = phi.std(0, correction=0)
        closure, weight = reference.at_layer(net, CE(), x, y, "6")
        want = float(reference.kappa_normalized(closure, weight, std))
        flat = relative_flatness(net, CE(), cut(x, y, [3, 7]), layer="6", normalize_features=True)
        assert flat.value == pytest.approx(want, rel=1e-9)
        assert flat.weight_norm == pytest.approx(float((net[6].weight * std).norm()), rel=1e-12)
        with pytest.raises(DataError, match="more than once"):
            relative_flatness(net, CE(), iter(cut(x, y, [3, 7])), layer="6", normalize_features=True)


class TestBadInput:
    def test_empty_data(self) -> None:
        with pytest.raises(DataError, match="empty"):
            relative_flatness(mlp(), CE(), [], layer="output")

    def test_a_batch_of_another_kind(self) -> None:
        x, y = data()
        with pytest.raises(DataError, match=r"tuple of length 3.*forward="):
            relative_flatness(mlp(), CE(), [(x, y, y)], layer="output")
        with pytest.raises(DataError, match="without 'labels'"):
            relative_flatness(mlp(), CE(), [{"x": x}], layer="output")

    def test_targets_outside_the_classes(self) -> None:
        x, y = data()
        with pytest.raises(LossError, match="outside the classes"):
            relative_flatness(mlp(), CE(), (x, y + 5), layer="output")

    def test_non_finite_loss_and_kappa(self) -> None:
        x, y = data()
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            relative_flatness(mlp(), CE(), (x * math.nan, y), layer="output")
        net = nn.Linear(4, 3)
        with torch.no_grad():
            net.weight.mul_(1e25)
        with pytest.raises(NonFiniteError, match="kappa of layer ''"):
            relative_flatness(net, CE(), (x.float() * 1e-25, y), layer="output")

    @pytest.mark.parametrize(
        ("kwargs", "said"),
        [({"probes": 0}, "probes=0"), ({"rtol": 0.0}, "rtol=0"), ({"method": "hutch"}, "method='hutch'")],
    )
    def test_arguments(self, kwargs, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            relative_flatness(mlp(), CE(), data(), layer="output", **kwargs)
