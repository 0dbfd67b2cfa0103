"""What a review of the core found, each pinned by a test that failed before its fix."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relflat import (
    FAM,
    ConfigError,
    GraphError,
    LayerError,
    RelflatWarning,
    per_sample_flatness,
    relative_flatness,
)

CE = nn.CrossEntropyLoss


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *between, nn.ReLU(), nn.Linear(6, 3)).double()


def data(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g)


def test_a_masked_entry_does_not_poison_the_gradient() -> None:
    net, (x, _) = mlp(), data()
    mask = torch.ones(3).double()
    mask[1] = 0
    fam = FAM(nn.BCEWithLogitsLoss(weight=mask), net, "0", strength=1.0)
    fam(net(x), torch.zeros(8, 3).double()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.logits, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h = self.body(x).relu()
        return {"logits": self.logits(h), "aux": self.aux(h)}


def test_ggn_of_a_loss_that_sees_the_layer_past_the_outputs_is_refused() -> None:
    net, (x, y) = TwoHeads().double(), data()
    loss_fn = lambda o, t: F.cross_entropy(o["logits"], t) + 5 * F.cross_entropy(o["aux"], t)
    for method in ("exact", "probe"):
        with pytest.raises(GraphError, match="also past the tensor taken for the outputs"):
            relative_flatness(net, loss_fn, (x, y), layer="body", curvature="ggn", method=method)
    relative_flatness(net, loss_fn, (x, y), layer="body", curvature="hessian", method="exact")


@pytest.mark.parametrize("order", [(40, 5), (5, 40)])
def test_exact_and_sampled_batches_together_keep_their_error(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x):
            return self.head(self.body(x).tanh().mean(1))

    batches = [(torch.randn(6, t, 4).double(), torch.randint(3, (6,))) for t in sorted(order)]
    batches = batches if order[0] < order[1] else batches[::-1]
    exact = relative_flatness(Pooled(), CE(), batches, layer="body", method="exact").value
    mixed = relative_flatness(Pooled(), CE(), batches, layer="body", probes=400)
    assert 0 < mixed.stderr < abs(exact)
    assert abs(mixed.value - exact) < 4 * mixed.stderr
    assert "exact" in mixed.method
    assert "probe" in mixed.method


def test_rtol_is_met_from_a_single_probe_on() -> None:
    net, (x, y) = mlp(nn.Tanh()), data(40)
    flat = relative_flatness(
        net, CE(), (x, y), layer="0", method="probe", probes=1, rtol=0.2, curvature="ggn"
    )
    assert 0 < flat.stderr <= 0.2 * flat.value


def test_a_constant_feature_is_not_divided_by_rounding() -> None:
    x, y = data(12)
    x[:, 2] = 0.1
    net = nn.Linear(4, 3).double()
    whole = relative_flatness(net, CE(), (x, y), layer="output", normalize_features=True).value
    for cut in ([7, 5], [3, 9], [1] * 12):
        batches = list(zip(x.split(cut), y.split(cut), strict=True))
        value = relative_flatness(net, CE(), batches, layer="output", normalize_features=True).value
        assert value == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_coupling_is_seen_in_half_precision_and_again_when_modes_change(curvature: str) -> None:
    x, y = data(2048)
    for dtype in (torch.float32, torch.bfloat16):
        net = mlp(nn.BatchNorm1d(6), nn.Tanh()).to(dtype)
        fam = FAM(CE(), net, "0", strength=1.0, curvature=curvature)
        net[1].eval()
        fam(net(x.to(dtype)), y)
        net[1].train()
        fam(net(x.to(dtype)), y)
        assert list(fam._estimator.memory.coupled.values()) == [False, True], dtype


def test_per_sample_values_of_an_unknown_sum() -> None:
    net, (x, y) = mlp(), data()
    known = per_sample_flatness(net, CE(reduction="sum"), (x, y), layer="output")
    unknown = per_sample_flatness(
        net, lambda o, t: F.cross_entropy(o, t, reduction="sum"), (x, y), layer="output", method="exact"
    )
    torch.testing.assert_close(known, unknown, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0.1, "gradient": "weights"},
        {"radius": 0.1, "layers_per_step": 1},
        {"radius": 0.1, "method": "closed_form"},
        {"method": "finite_difference", "curvature": "hessian", "gradient": "weights"},
    ],
)
def test_options_without_meaning_are_refused(options) -> None:
    with pytest.raises(ConfigError, match=r"no meaning|full gradient only"):
        FAM(CE(), mlp(), "output", strength=1.0, **options)


def test_a_criterion_in_evaluation_mode_keeps_nothing() -> None:
    net, (x, y) = mlp(), data()
    fam = FAM(CE(), net, "output", strength=1.0)
    fam.eval()
    for _ in range(20):
        fam(net(x), y)
    assert fam._tap.pending == 0
    fam.train()
    fam(net(x), y)


def test_a_loss_flat_on_the_first_batch_does_not_stop_training() -> None:
    net, (x, _) = mlp(), data()
    fam = FAM(nn.HuberLoss(delta=0.1), net, "output", strength=1.0)
    far, near = torch.full((8, 3), 100.0).double(), net(x).detach()
    with pytest.warns(RelflatWarning, match="no curvature on this batch"):
        fam(net(x), far)
    fam(net(x), near)
    assert fam.last["kappa"] > 0


def test_a_common_row_of_the_weight_costs_no_digits() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    x, y = torch.randn(32, 6), torch.randint(4, (32,))
    before = relative_flatness(net, CE(), (x, y), layer="output").value
    with torch.no_grad():
        net.weight += 100
    assert relative_flatness(net, CE(), (x, y), layer="output").value == pytest.approx(before, rel=2e-4)


def test_dropping_the_criterion_stops_its_noise_at_once() -> None:
    net, (x, _) = mlp(), data()
    clean = net(x)
    gc.disable()
    try:
        fam = FAM(CE(), net, "0", strength=1.0, radius=0.5)
        assert not torch.equal(net(x), clean)
        del fam
        assert torch.equal(net(x), clean)
    finally:
        gc.enable()


def test_outputs_that_are_copies_on_some_batches_only() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            z = self.fc(x)
            return z if len(x) == 3 else z * 1.0

    net, (x, y) = Sometimes().double(), data(8)
    cut = list(zip(x.split([3, 5]), y.split([3, 5]), strict=True))
    want = relative_flatness(net.fc, CE(), (x, y), layer="output").value
    assert relative_flatness(net, CE(), cut, layer="fc").value == pytest.approx(want, rel=1e-9)


def test_inference_mode_is_refused() -> None:
    net, (x, y) = mlp(), data()
    with torch.inference_mode(), pytest.raises(GraphError, match="inference_mode"):
        relative_flatness(net, CE(), (x, y), layer="output")


def test_a_draw_of_exactly_zero_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = nn.Linear(1, 3), torch.randint(3, (8,))
    monkeypatch.setattr("relflat.rng.Rng.normal", lambda self, like: torch.zeros_like(like))
    fam = FAM(CE(), net, "output", strength=1.0, radius=0.5)
    assert torch.isfinite(fam(net(torch.randn(8, 1)), y))


def test_an_expert_that_rests_has_no_kappa_in_that_step() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.turn = nn.Linear(4, 3), nn.Linear(4, 3), "a"

        def forward(self, x):
            return getattr(self, self.turn)(x)

    net, (x, y) = Experts().double(), data()
    fam = FAM(CE(), net, "b", strength=1.0)
    net.turn = "b"
    fam(net(x), y)
    net.turn = "a"
    fam(net(x), y).backward()
    assert fam.last["kappa"] == 0


def test_a_criterion_that_cannot_be_built_leaves_no_hooks() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    for options in ({"layer": "0", "gradient": "weights"}, {"layer": "0.weight", "radius": 0.1}):
        with pytest.raises(ValueError, match=r"frozen|parameter") as held:
            FAM(CE(), net, strength=1.0, **options)
        assert held.value is not None
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_ignored_targets_have_no_part_in_confidence(cut: int) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4).double() * 3, torch.tensor([0, -100, 2, -100, -100, 1])
    flat = relative_flatness(
        net, nn.CrossEntropyLoss(), list(zip(x.split(cut), y.split(cut), strict=True)), layer="output"
    )
    top = net(x).softmax(-1).amax(-1)
    assert flat.confidence == pytest.approx(float(top[y != -100].detach().mean()), rel=1e-12)
    assert flat.confidence != pytest.approx(float(top.detach().mean()), rel=1e-3)


def test_lora_with_active_dropout_is_refused_and_its_factor_is_not() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def adapted(dropout: float) -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(base), config)

    net, name = adapted(0.5), "base_model.model.0"
    with pytest.raises(LayerError, match=r"adapter 'default' of layer '.*0' has active dropout"):
        FAM(nn.CrossEntropyLoss(), net, name, strength=0.1)(net(x), y)
    factor = FAM(nn.CrossEntropyLoss(), net, f"{name}.lora_B.default", strength=0.1)
    factor(net(x), y).backward()
    assert factor.last["kappa"] > 0
    assert relative_flatness(net, nn.CrossEntropyLoss(), (x, y), layer=name).value != 0  # not active here
    plain = adapted(0.0)
    FAM(nn.CrossEntropyLoss(), plain, name, strength=0.1)(plain(x), y).backward()
