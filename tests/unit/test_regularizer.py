"""FAM as a criterion: what it adds, when, to what, and what it leaves alone."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from device import DEVICE
from relflat import ConfigError, GraphError, LayerError, LossError, RelflatWarning, reference, relative_flatness
from unbounded import FAM

CE = nn.CrossEntropyLoss


def mlp(seed: int = 0, **kwargs) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def grads(net: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True))


def kappa_of(net: nn.Module, x, y, name: str, loss_fn=None) -> torch.Tensor:
    closure, weight = reference.at_layer(net, loss_fn or CE(), x, y, name)
    return reference.kappa(closure, weight)


class TestSchedule:
    def test_every_and_warm_up(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "output", strength=1.0, every=2, warmup_steps=4)
        seen = []
        for _ in range(8):
            fam(net(x), y)
            seen.append(fam.last["strength"])
        assert seen == pytest.approx([0.2, 0, 0.6, 0, 1.0, 0, 1.0, 0])
        assert fam.last["penalty"] == 0.0
        assert fam.last["total"] == fam.last["task"]

    def test_step_and_seed_determine_the_probes(self) -> None:
        net, (x, y) = mlp(), batch()

        def run(start: int, n: int) -> list[float]:
            fam = FAM(CE(), net, "2", strength=1.0, seed=7)
            fam.step = start
            out = []
            for _ in range(n):
                fam(net(x), y)
                out.append(fam.last["kappa"])
            return out

        whole = run(0, 6)
        assert whole[3:] == run(3, 3)
        assert len(set(whole)) == 6

    def test_the_default_seed_follows_manual_seed(self) -> None:
        net, (x, y) = mlp(), batch()
        values = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            fam = FAM(CE(), net, "2", strength=1.0)
            fam(net(x), y)
            values.append(fam.last["kappa"])
        assert values[0] == values[1] != values[2]

    def test_negative_strength(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "output", strength=-0.5)
        loss = fam(net(x), y)
        assert float(loss.detach()) < fam.last["task"]


class TestNeighbours:
    def test_dropout_stream_is_bitwise_the_same(self) -> None:
        x, y = batch()
        net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        net = net.double()
        runs = []
        for make in (
            lambda: CE(),
            lambda: FAM(CE(), net, "2", strength=0.1),
            lambda: FAM(CE(), net, "2", strength=0.1, curvature="hessian", method="finite_difference"),
            lambda: FAM(CE(), net, ["0", "2"], strength=0.1, radius=0.3),
        ):
            criterion = make()
            torch.manual_seed(5)
            outs = []
            for _ in range(3):
                out = net(x)
                outs.append(out.detach())
                criterion(out, y)
            runs.append(torch.stack(outs))
        assert all(torch.equal(r, runs[0]) for r in runs[1:])

    def test_replayed_passes_use_the_same_dropout_masks(self) -> None:
        x, y = batch()
        net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
        fam = FAM(CE(), net, "0", strength=0.5, radius=1e-9)
        fam(net(x), y)
        assert abs(fam.last["kappa"]) < 1e-6  # other masks would change the loss by far more

    def test_batchnorm_statistics_are_updated_once(self) -> None:
        x, y = batch()
        counts = []
        for make in (
            lambda n: CE(),
            lambda n: FAM(CE(), n, "0", strength=0.1),
            lambda n: FAM(CE(), n, "0", strength=0.5, radius=0.3),
            lambda n: FAM(CE(), n, "0", strength=0.1, curvature="hessian", method="finite_difference"),
        ):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
            make(net)(net(x), y).backward()
            counts.append((int(net[1].num_batches_tracked), net[1].running_mean.clone()))
        assert all(c[0] == 1 and torch.equal(c[1], counts[0][1]) for c in counts)

    def test_accumulated_gradients_equal_the_full_batch(self) -> None:
        net, (x, y) = mlp(), batch(8)
        fam = FAM(CE(), net, ["output", "2"][0], strength=0.3)
        whole = grads(net, fam(net(x), y))
        parts = [grads(net, fam(net(x[i : i + 2]), y[i : i + 2]) / 4) for i in range(0, 8, 2)]
        for a, b in zip(whole, map(sum, zip(*parts, strict=True)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    def test_state_dict_is_that_of_the_criterion(self) -> None:
        class Lit(nn.Module):
            def __init__(self, fam: bool) -> None:
                super().__init__()
                self.net = mlp()
                plain = CE(weight=torch.tensor([1.0, 2.0, 3.0]).double())
                self.criterion = FAM(plain, self.net, "output", strength=1.0) if fam else plain

        plain, wrapped = Lit(False), Lit(True)
        assert list(plain.state_dict()) == list(wrapped.state_dict())
        plain.criterion.weight.mul_(5)
        wrapped.load_state_dict(plain.state_dict())
        assert wrapped.criterion.loss_fn.weight.tolist() == [5, 10, 15]
        plain.load_state_dict(wrapped.state_dict())
        assert not list(wrapped.criterion.parameters())

    def test_trains_with_an_optimiser_and_lowers_kappa(self) -> None:
        x, y = batch(64)
        finals = []
        for strength in (0.0, 5.0):
            net = mlp()
            opt = torch.optim.SGD(net.parameters(), lr=0.1)
            fam = FAM(CE(), net, "output", strength=strength)
            for _ in range(50):
                opt.zero_grad()
                fam(net(x), y).backward()
                opt.step()
            finals.append(relative_flatness(net, CE(), (x, y), layer="output").value)
        assert finals[1] < finals[0]


class TestLosses:
    def test_partial_and_functional_take_the_closed_form(self) -> None:
        net, (x, y) = mlp(), batch()
        for loss_fn in (F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1)):
            fam = FAM(loss_fn, net, "output", strength=1.0, method="closed_form")
            fam(net(x), y)
            want = kappa_of(net, x, y, "4", lambda o, t: F.cross_entropy(o, t))  # smoothing has no curvature
            assert fam.last["kappa"] == pytest.approx(float(want), rel=1e-12)

    def test_a_subclass_with_its_own_forward_is_not_trusted(self) -> None:
        class Doubled(CE):
            def forward(self, z, y):
                return 2 * super().forward(z, y)

        net, (x, y) = mlp(), batch()
        fam = FAM(Doubled(), net, "output", strength=1.0)
        fam(net(x), y)
        assert fam.last["method"] == "closed_form"  # as its graph says
        assert fam.last["kappa"] == pytest.approx(2 * float(kappa_of(net, x, y, "4")), rel=1e-10)

    def test_binary_classifier_with_squeezed_output(self) -> None:
        torch.manual_seed(0)

        class Binary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

            def forward(self, x):
                return self.head(self.body(x).relu()).squeeze(1)

        net, (x, y) = Binary().double(), batch()
        y = (y > 0).double()
        fam = FAM(nn.BCEWithLogitsLoss(), net, "output", strength=1.0, method="closed_form")
        fam(net(x), y)
        want = kappa_of(net, x, y, "head", nn.BCEWithLogitsLoss())
        assert fam.last["kappa"] == pytest.approx(float(want), rel=1e-12)

    def test_no_reduction_gives_each_sample_its_share(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(reduction="none"), net, "output", strength=0.7)
        each = fam(net(x), y)
        assert each.shape == (8,)
        whole = FAM(CE(), net, "output", strength=0.7)(net(x), y)
        torch.testing.assert_close(each.mean(), whole, rtol=1e-12, atol=0)

    def test_penalty_of_a_loss_tensor_scales_with_it(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "output", strength=0.7)
        first = fam.penalty(CE()(net(x), y))
        tripled = fam.penalty(3 * CE()(net(x), y))
        torch.testing.assert_close(3 * first, tripled, rtol=1e-12, atol=0)
        fam(net(x), y)
        assert float(first) == pytest.approx(fam.last["penalty"], rel=1e-12)
        net.eval()
        assert float(fam.penalty(CE()(net(x), y))) == 0.0

    def test_penalty_by_ggn_of_an_unknown_loss_on_a_hidden_layer(self) -> None:
        net, (x, y) = mlp(), batch()
        smoothed = CE(label_smoothing=0.1)  # made of several operations, so its graph is not recognised
        fam = FAM(None, net, "2", strength=1.0, probes=400, seed=0)
        value = float(fam.penalty(smoothed(net(x), y)))
        exact = FAM(None, net, "2", strength=1.0, method="exact")
        assert value == pytest.approx(float(exact.penalty(smoothed(net(x), y))), rel=0.15)
        assert "ggn" in fam.last["method"]

    def test_a_hinge_has_no_hessian(self) -> None:
        net, (x, y) = mlp(), batch()
        for layer, curvature in (("output", "ggn"), ("2", "hessian"), ("2", "ggn")):
            fam = FAM(nn.MultiMarginLoss(), net, layer, strength=1.0, curvature=curvature)
            with pytest.raises(LossError, match="hinge"):
                fam(net(x), y)

    def test_two_views_of_a_batch(self) -> None:
        """Two forward passes and one loss: kappa counts the layer's use in both."""
        net, (x, _) = mlp(), batch()
        exact = FAM(lambda a, b: (a - b).square().mean(), net, "2", strength=1.0, curvature="hessian", method="exact")
        a, b = net(x), net(x + 0.3)
        exact(a, b)

        def loss(weight):
            both = [torch.func.functional_call(net, {"2.weight": weight}, (v,)) for v in (x, x + 0.3)]
            return (both[0] - both[1]).square().mean()

        want = reference.kappa(loss, net[2].weight.detach())
        assert exact.last["kappa"] == pytest.approx(float(want), rel=1e-9)


class TestCoupling:
    @pytest.mark.slow
    def test_batchnorm_in_training_mode_is_detected_and_exact(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3)
        ).double()
        x, y = batch(5)
        for p in net.parameters():
            p.data += 0.1
        want = float(kappa_of(net, x, y, "0"))
        fam = FAM(CE(), net, "0", strength=1.0, curvature="hessian", method="exact")
        fam(net(x), y)
        assert fam.last["kappa"] == pytest.approx(want, rel=1e-9, abs=1e-12)
        many = FAM(CE(), net, "0", strength=1.0, curvature="hessian", probes=1000, seed=1)
        many(net(x), y)
        assert many.last["kappa"] == pytest.approx(want, rel=0.2, abs=0.02)


class TestPrecision:
    @pytest.mark.parametrize("curvature", ["ggn", "hessian"])
    @pytest.mark.parametrize("layer", ["4", "2"])
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    def test_autocast_computes_kappa_in_float32(self, half: torch.dtype, layer: str, curvature: str) -> None:
        x, y = batch(64)
        net = mlp().float()
        fam = FAM(CE(), net, layer, strength=1.0, curvature=curvature, seed=0)
        with torch.autocast(DEVICE.type, dtype=half):
            loss = fam(net(x.float()), y)
        loss.backward()
        mixed = fam.last["kappa"]
        fam.step = 0
        fam(net(x.float()), y)
        assert mixed == pytest.approx(fam.last["kappa"], rel=0.1)
        assert fam.last["method"] == ("closed_form" if layer == "4" else f"probe({curvature}, 1)")

    def test_a_confident_classifier_keeps_its_digits(self) -> None:
        """float32 at p = 1 - 1e-6: the textbook formula loses all digits."""
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
        x, y = torch.randn(32, 6), torch.randint(4, (32,))
        with torch.no_grad():
            net.bias[2] += 16
        wide = nn.Linear(6, 4).double()
        wide.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
        values = []
        for model, inputs in ((net, x), (wide, x.double())):
            fam = FAM(CE(), model, "output", strength=1.0)
            fam(model(inputs), y)
            values.append(fam.last["kappa"])
        assert 0 < values[1] < 1e-3
        assert values[0] == pytest.approx(values[1], rel=1e-4)

    def test_half_precision_model(self) -> None:
        x, y = batch()
        net = mlp().bfloat16()
        fam = FAM(CE(), net, "output", strength=1.0)
        loss = fam(net(x.bfloat16()), y)
        loss.backward()
        assert loss.dtype == torch.bfloat16
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())


class TestNonFinite:
    def test_a_non_finite_kappa_is_left_out_named_and_counted(self) -> None:
        net, (x, y) = mlp().float(), batch()
        with torch.no_grad():
            net[4].weight.mul_(1e30)
            net[2].weight.mul_(1e-30), net[2].bias.mul_(1e-30)
        fam = FAM(CE(), net, "output", strength=1.0)
        with pytest.warns(RelflatWarning, match="kappa of layer '4' is"):
            loss = fam(net(x.float()), y)
        loss.backward()
        assert fam.last["skipped"] == 1
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())

    def test_a_non_finite_task_loss_is_passed_on_without_penalty(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "output", strength=1.0)
        with pytest.warns(RelflatWarning, match="the task loss is nan"):
            loss = fam(net(x * math.nan), y)
        assert math.isnan(float(loss))
        assert fam.last["penalty"] == 0.0


class TestFrozenLayers:
    @pytest.mark.parametrize("curvature", ["ggn", "hessian"])
    @pytest.mark.parametrize("layer", ["0", "2", "4"])
    def test_kappa_of_a_frozen_layer_is_defined(self, layer: str, curvature: str) -> None:
        x, y = batch()
        net = mlp()
        want = float(kappa_of(net, x, y, layer))
        net.requires_grad_(False)
        net[4].requires_grad_(True)
        net[int(layer)].weight.requires_grad_(False)
        fam = FAM(CE(), net, layer, strength=1.0, curvature="hessian", method="exact")
        loss = fam(net(x), y)
        assert fam.last["kappa"] == pytest.approx(want, rel=1e-9)
        loss.backward()

    def test_gradient_weights_needs_a_trainable_weight(self) -> None:
        net = mlp()
        net[2].weight.requires_grad_(False)
        with pytest.raises(LayerError, match=r"'2'.*requires_grad=False"):
            FAM(CE(), net, "2", strength=1.0, gradient="weights")


class TestRadius:
    @pytest.mark.slow
    def test_small_radius_is_kappa(self) -> None:
        """I8: the increase over radius^2 / (2 m) tends to kappa, for an output and a hidden layer."""
        net, (x, y) = mlp(), batch(64)
        for layer, m in (("4", 5), ("2", 6)):
            want = float(kappa_of(net, x, y, layer))
            delta = 1e-2
            fam = FAM(CE(), net, layer, strength=0.5, radius=delta, probes=100, seed=0)
            # antithetic first-order terms average out only slowly, so compare within their error
            fam(net(x.repeat(30, 1)), y.repeat(30))  # each copy of a sample has noise of its own
            got = fam.last["kappa"] * 2 * m / delta**2
            slope = 2 * m / delta / math.sqrt(3000 * 64)
            assert got == pytest.approx(want, abs=4 * slope)

    def test_output_layer_runs_the_head_alone(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "output", strength=1.0, radius=0.5)
        runs = []
        net[0].register_forward_hook(lambda *a: runs.append(1))
        for _ in range(3):
            fam(net(x), y).backward()
        assert len(runs) == 3
        assert fam.last["penalty"] == pytest.approx(fam.last["total"] - fam.last["task"])

    def test_hidden_layer_with_strength_one_needs_no_extra_pass(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "2", strength=1.0, radius=0.5)
        runs = []
        net[0].register_forward_hook(lambda *a: runs.append(1))
        for _ in range(5):
            fam(net(x), y).backward()
        assert len(runs) == 5
        assert "perturbed forward" in fam.last["method"]
        net.eval()
        assert torch.equal(net(x), net(x))

    def test_layers_of_equal_width_get_independent_noise(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)).double()
        x = torch.randn(8, 5).double()
        fam = FAM(CE(), net, ["0", "1"], strength=1.0, radius=0.5, adaptive=True)
        seen = {}
        for i in (0, 1):
            net[i].register_forward_hook(lambda m, a, o, i=i: seen.setdefault(i, []).append(a[0].detach()))
        fam(net(x), torch.randint(3, (8,)))
        with torch.no_grad():
            net.eval()
            net(x)
        noises = [seen[0][0] / seen[0][1] - 1, seen[1][0] / net[0](seen[0][0]).detach() - 1]
        assert not torch.allclose(noises[0], noises[1])
        assert all(float(n.std()) > 0.2 for n in noises)

    def test_hidden_layer_other_strengths_repeat_the_forward(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, ["0", "2"], strength=0.5, radius=0.5)
        loss = fam(net(x), y)
        assert float(loss) == pytest.approx(fam.last["task"] + fam.last["penalty"])
        loss.backward()
        assert net[0].weight.grad is not None

    @pytest.mark.slow
    def test_adaptive_radius_is_gaussian_dropout(self) -> None:
        net, (x, y) = nn.Linear(4, 3).double(), batch(4)
        fam = FAM(CE(), net, "output", strength=1.0, radius=0.7, adaptive=True, probes=50, seed=0)
        fam(net(x.repeat(400, 1)), y.repeat(400))  # each copy of a sample has noise of its own
        noisy = x * (1 + 0.7 * torch.randn(20000, 4, 4, dtype=torch.float64))
        logits = net(noisy).flatten(0, 1)
        want = CE()(logits, y.repeat(20000)) - CE()(net(x), y)
        assert fam.last["kappa"] == pytest.approx(float(want), rel=0.1)

    def test_a_computed_part_of_the_outputs_cannot_be_repeated(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "2", strength=0.5, radius=0.5)
        with pytest.raises(GraphError, match="cannot repeat"):
            fam(net(x) * 2, y)


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "said"),
        [
            ({"curvature": "fisher"}, "curvature='fisher'.*hessian"),
            ({"method": "hutchinson"}, "method='hutchinson'"),
            ({"gradient": "none"}, "gradient='none'"),
            ({"probes": 0}, "probes=0"),
            ({"every": 0}, "every=0"),
            ({"warmup_steps": -1}, "warmup_steps=-1"),
            ({"strength": math.inf}, "strength=inf"),
            ({"radius": -1.0}, "radius=-1"),
            ({"method": "finite_difference"}, "add curvature='hessian'"),
        ],
    )
    def test_arguments(self, kwargs, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            FAM(CE(), mlp(), "output", **{"strength": 1.0, **kwargs})

    def test_targets_outside_the_classes(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "output", strength=1.0)
        with pytest.raises(LossError, match=r"Target 7 is out of bounds.*ignore_index"):
            fam(net(x), y.clamp(min=7))

    def test_a_criterion_that_returns_no_tensor(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(lambda o, t: (F.cross_entropy(o, t), 1), net, "output", strength=1.0)
        with pytest.raises(LossError, match="returned tuple"):
            fam(net(x), y)

    def test_closed_form_that_does_not_apply_says_why(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "2", strength=1.0, method="closed_form")
        with pytest.raises(LossError, match="not the output layer"):
            fam(net(x), y)

    def test_finite_radius_of_a_loss_tensor(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, "2", strength=1.0, radius=0.1)
        with pytest.raises(ConfigError, match="perturbed pass"):
            fam.penalty(CE()(net(x), y))


class TestSeveralLayers:
    def test_kappas_add_and_are_reported_by_layer(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, ["2", "4"], strength=0.5, curvature="hessian", method="exact")
        fam(net(x), y)
        each = {n: float(kappa_of(net, x, y, n)) for n in ("2", "4")}
        assert fam.last["by_layer"] == pytest.approx(each, rel=1e-9)
        assert fam.last["kappa"] == pytest.approx(sum(each.values()), rel=1e-9)

    def test_one_pull_back_serves_all_layers(self) -> None:
        net, (x, y) = mlp(), batch()
        backwards = []
        for names in (["2"], ["0", "2"]):
            fam = FAM(CE(), net, names, strength=0.5)
            fam(net(x), y)  # settles whether samples are coupled
            out = net(x)
            calls = []
            out.grad_fn.register_hook(lambda *a, calls=calls: calls.append(1))
            fam(out, y)
            backwards.append(len(calls))
        assert backwards == [1, 1]


class TestOutputAmongOthers:
    def test_output_in_a_list_is_narrowed_too(self) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE(), net, ["0", "output"], strength=0.5)
        fam(net(x), y)
        assert fam.layers == ["0", "4"]

    def test_head_only_finetuning_with_gradient_weights(self) -> None:
        net, (x, y) = mlp(), batch()
        net[:4].requires_grad_(False)
        fam = FAM(CE(), net, "output", strength=0.5, gradient="weights")
        fam(net(x), y).backward()
        assert net[4].weight.grad is not None

    def test_strength_and_mode_may_change_while_noise_is_injected(self) -> None:
        net, (x, _) = mlp(), batch()
        fam = FAM(CE(), net, "2", strength=1.0, radius=0.5)
        assert not torch.equal(net(x), net(x))
        fam.reset()
        fam.strength = 0.0
        assert torch.equal(net(x), net(x))
        fam.reset()
        fam.strength = 1.0
        fam.eval()
        assert torch.equal(net(x), net(x))

    def test_absolute_error_has_no_curvature(self) -> None:
        net, (x, _) = mlp(), batch()
        fam = FAM(nn.L1Loss(), net, "output", strength=0.5)
        target = torch.zeros(8, 3, dtype=torch.float64)
        with pytest.warns(RelflatWarning, match="no curvature"):
            fam(net(x), target)
        with pytest.warns(RelflatWarning, match="no curvature"):
            assert relative_flatness(net, nn.L1Loss(), (x, target), layer="output").value == 0


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-5), (torch.float32, 4e-3)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_differences_and_products_along_the_same_directions(dtype: torch.dtype, close: float, adaptive: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y, found = torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,)), []
    for method in ("probe", "finite_difference"):
        options = {"curvature": "hessian", "method": method, "probes": 4, "adaptive": adaptive, "seed": 3}
        with FAM(CE(), net, net[0].weight, strength=1.0, **options) as fam:
            fam(net(x), y)
        found.append(fam.last["kappa"])
    assert found[0] == pytest.approx(found[1], rel=close, abs=close / 100)
