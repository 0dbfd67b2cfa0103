"""Guards: said once, counted, and the training untouched."""

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relflat import FAM, RelflatWarning, relative_flatness
from relflat.guards import Guards, spread

CE = nn.CrossEntropyLoss


def data(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


class TestNegative:
    def test_a_negative_exact_kappa_is_said_once_and_offers_the_ggn(self) -> None:
        x, y = data()
        for seed in range(50):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
            if relative_flatness(net, CE(), (x, y), layer="0", method="exact").value < 0:
                break
        fam = FAM(CE(), net, "0", strength=1.0, curvature="hessian", method="exact")
        with pytest.warns(RelflatWarning, match=r"kappa of layer '0' is -.*curvature='ggn'"):
            fam(net(x), y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fam(net(x), y)


class TestCollapse:
    def test_a_network_that_became_constant_raises_the_alarm(self) -> None:
        torch.manual_seed(0)
        x, y = data()
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        fam = FAM(CE(), net, "output", strength=0.1)
        fam(net(x), y)
        assert fam.last["collapsed"] == []
        with torch.no_grad():
            net[0].weight.zero_()
        with pytest.warns(RelflatWarning, match="no longer depend on the input"):
            for _ in range(60):
                fam(net(x), y)
        assert fam.last["collapsed"] == ["the features of layer '2'", "the outputs"]

    def test_said_at_the_fifth_look_in_a_row_of_every_tenth_step(self) -> None:
        guards, constant, varied = Guards(), {"it": torch.ones(4, 3)}, {"it": torch.eye(4)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(40):
                guards.collapse(step, constant)
            guards.collapse(40, varied)
            for step in range(41, 90):
                guards.collapse(step, constant)
        with pytest.warns(RelflatWarning, match=r"^it no longer.*over the last 50 steps.*less than 0.001 of"):
            guards.collapse(90, constant)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(91, 200):
                guards.collapse(step, constant)

    def test_looked_at_are_two_samples_or_more_that_vary_by_less_than_a_thousandth(self) -> None:
        tensors = {f"{by:g}": torch.tensor([[1 + by], [1 - by]]) for by in (0.0, 5e-4, 2e-3, 0.5)}
        tensors |= {"one sample": torch.ones(1, 3), "numbers": torch.ones(4)}
        guards = Guards()
        for step in (1, 5, 9, 11):
            guards.collapse(step, tensors)
            assert guards.collapsed == []
        guards.collapse(20, tensors)
        assert guards.collapsed == ["0", "0.0005"]

    def test_spread(self) -> None:
        assert spread(torch.tensor([[0], [2]])) == pytest.approx(0.5**0.5)
        assert spread(torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16)) == pytest.approx((1 / 6) ** 0.5)
        assert spread(torch.ones(4, 3)) == 0
        assert spread(torch.zeros(4, 3)) == 1
        assert spread(torch.randn(1000, 3)) == pytest.approx(1, rel=0.01)


class Attention(nn.Module):
    """An embedding, attention by the fused kernel, classes: no second derivative after the first layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.enter(x)[:, None]
        h = F.scaled_dot_product_attention(h, h, h)
        return self.head(h[:, 0].mean(1))


class TestFallback:
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(6, 5, 8), torch.tensor([0, 1, 2, 0, 1, 2])

    @pytest.mark.parametrize("options", [{"curvature": "hessian", "method": "exact"}, {"method": "exact"}, {}])
    def test_fused_attention_is_run_again_by_the_math_backend_and_said_once(self, options) -> None:
        x, y = self.tokens()
        net, plain = Attention(), Attention()
        fam = FAM(CE(), net, "enter", strength=1.0, seed=0, **options)

        def gradients(fam: FAM, net: nn.Module) -> list[torch.Tensor]:
            z = net(x)
            return list(torch.autograd.grad(fam(z, y) - CE()(z, y), list(net.parameters())))

        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got = [gradients(fam, net) for _ in range(2)]
        assert [str(w.message).count("scaled_dot_product") for w in seen if "math backend" in str(w.message)] == [1]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            twin = FAM(CE(), plain, "enter", strength=1.0, seed=0, **options)
            want = [gradients(twin, plain) for _ in range(2)]
        for mine, others in zip(got, want, strict=True):
            torch.testing.assert_close(mine, others, rtol=1e-3, atol=1e-5)

    def test_measured_through_fused_attention(self) -> None:
        x, y = self.tokens()
        with pytest.warns(RelflatWarning, match=r"math backend.*scaled_dot_product"):
            flat = relative_flatness(Attention(), CE(), (x, y), layer="enter", method="exact")
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = relative_flatness(Attention(), CE(), (x, y), layer="enter", method="exact").value
        assert flat.value == pytest.approx(want, rel=1e-4)

    def test_frozen_needs_no_second_derivatives(self) -> None:
        x, y = self.tokens()
        net = Attention()
        frozen = FAM(CE(), net, "enter", strength=0.01, gradient="frozen")
        frozen(net(x), y).backward()
        assert frozen.last["kappa"] > 0

    def test_anything_else_falls_back_to_finite_differences_and_says_so(self) -> None:
        x, net = torch.randn(4, 2, 5), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        lengths = torch.full((2,), 4), torch.full((2,), 2)
        ctc = lambda z, y: F.ctc_loss(z.log_softmax(-1), y, *lengths)
        fam = FAM(ctc, net, "0", strength=0.01, curvature="hessian")
        with pytest.warns(RelflatWarning, match=r"finite differences.*ctc_loss"):
            fam(net(x), torch.tensor([[1, 2], [2, 1]])).backward()
        assert "finite_difference(hessian" in fam.last["method"]

    def test_measuring_the_ggn_needs_first_derivatives_only(self) -> None:
        x, y = self.tokens()
        flat = relative_flatness(Attention(), CE(), (x, y), layer="enter", curvature="ggn", method="probe")
        assert flat.value > 0


class TestWhere:
    """A warning points at the line of the user that led to it, not into torch or this library."""

    def test_in_a_training_loop(self) -> None:
        x, y = data()
        fam = FAM(nn.L1Loss(), net := nn.Linear(4, 3), "output", strength=1.0)
        with pytest.warns(RelflatWarning, match="no curvature") as seen:
            fam(net(x), F.one_hot(y, 3).float())
        assert [(w.filename, w.lineno) for w in seen] == [(__file__, line_of("F.one_hot(y, 3).float())"))]

    def test_of_a_loss_that_is_not_finite(self) -> None:
        x, y = data()
        fam = FAM(CE(), net := nn.Linear(4, 3), "output", strength=1.0)
        out = net(x * float("nan"))
        with pytest.warns(RelflatWarning, match="the task loss") as seen:
            fam.penalty(CE()(out, y))
        assert [(w.filename, w.lineno) for w in seen] == [(__file__, line_of("fam.penalty(CE()(out, y))"))]


def line_of(text: str) -> int:
    """Number of the first line of this file that has a text."""
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_kappas_of_several_layers_are_looked_at_once(monkeypatch) -> None:
    """Looking makes the program wait for the device: once for the loss, once for all kappas."""
    x, y = data()
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.Linear(4, 3))
    fam = FAM(CE(), net, "*", strength=1.0)
    fam(net(x), y)
    waits: list[int] = []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: waits.append(1) or original(t))
    out = net(x)
    fam(out, y)
    assert len(waits) == 2


def test_the_layer_whose_kappa_is_not_finite_is_named() -> None:
    guards = Guards()
    values = {"first": torch.ones(2), "second": torch.tensor([1.0, float("inf")], dtype=torch.float64)}
    with pytest.warns(RelflatWarning, match="'second' is inf at step 3"):
        assert not guards.judge(values, 3, may_be_negative=False)
    assert guards.skipped == 1
    assert guards.judge({"first": torch.ones(2)}, 4, may_be_negative=False)
    assert guards.judge({}, 4, may_be_negative=False)


def test_a_negative_kappa_is_that_of_all_samples_in_the_mean_over_probes() -> None:
    guards, silent = Guards(), {"zero": torch.zeros(1, 2), "sum": torch.tensor([[3.0, -2.0], [-4.0, 3.0]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guards.judge(silent, 0, may_be_negative=True)
        assert guards.judge({"below": -torch.ones(1, 2)}, 0, may_be_negative=False)
    with pytest.warns(RelflatWarning, match="kappa of layer 'below' is -3, or"):
        assert guards.judge(silent | {"below": torch.tensor([[1.0, -6.0], [-3.0, 2.0]])}, 0, may_be_negative=True)
    assert guards.skipped == 0


def test_what_is_left_out_is_counted_each_time_and_said_once() -> None:
    guards = Guards()
    with pytest.warns(RelflatWarning, match=r"^the task loss is nan at step 2"):
        assert not guards.finite("the task loss", torch.tensor([1.0, math.nan, math.inf]), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not guards.judge({"a": torch.ones(1, 1)}, 3, may_be_negative=False, lost=["a"])
        assert guards.finite("the task loss", torch.ones(2), 4)
        assert guards.judge({"a": torch.ones(1, 1)}, 5, may_be_negative=False)
    assert guards.skipped == 2
    with pytest.warns(RelflatWarning, match=r"gradient of kappa of layer 'b' is nan .* at step 6"):
        assert not Guards().judge({"b": torch.ones(1, 1)}, 6, may_be_negative=False, lost=["b", "c"])
