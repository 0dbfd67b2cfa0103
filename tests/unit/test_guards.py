"""Guards: said once, counted, and the training untouched."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relflat import RelflatWarning, relative_flatness
from relflat.guards import Guards, spread
from unbounded import FAM

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

    def test_spread(self) -> None:
        assert spread(torch.ones(4, 3)) == 0
        assert spread(torch.zeros(4, 3)) == 1
        assert spread(torch.randn(1000, 3)) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"curvature": "hessian", "method": "exact"}])
def test_complex_outputs_are_looked_at_without_a_word_and_have_their_kappa(options: dict[str, str]) -> None:
    """``mean |z - t|^2`` has the Hessian 2 / 24 in each of the 48 real numbers, whatever they are put together to."""
    torch.manual_seed(0)
    first, last = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double(), nn.Linear(5, 6).double()
    net = nn.Sequential(first, last, nn.Unflatten(-1, (3, 2)))
    net.register_forward_hook(lambda module, args, out: torch.view_as_complex(out))
    x, t = torch.randn(8, 4).double(), torch.randn(8, 3, dtype=torch.complex128)
    fam = FAM(lambda z, t: (z - t).abs().square().mean(), net, "1", strength=1.0, probes=400, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fam(net(x), t).backward()
    want = float(first(x).square().sum() * last.weight.square().sum()) / 12
    assert fam.last["kappa"] == pytest.approx(want, rel=1e-9 if options else 0.1)


def test_a_complex_output_of_one_size_varies_by_its_angle() -> None:
    angles = torch.arange(6) * torch.pi / 3
    assert float(spread(torch.polar(torch.ones(6), angles)[:, None].conj())) == pytest.approx(1.0)
    assert float(spread(torch.full((6, 1), 1j, dtype=torch.complex64))) == 0


class TestTrainedInEvaluationMode:
    @pytest.fixture
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()

    @pytest.mark.parametrize("alone", [False, True])
    def test_it_is_said_once_by_the_backward_pass_and_not_by_validation(self, net: nn.Module, alone: bool) -> None:
        x, y = data()
        fam = FAM(None if alone else CE(), net, "output", strength=1.0)

        def loss() -> torch.Tensor:
            return CE()(net(x), y) + fam.penalty(CE()(net(x), y)) if alone else fam(net(x), y)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss()  # as in validation, which nobody differentiates
            with torch.no_grad():
                loss()
        if alone:
            before = CE()(net(x), y)
            fam.penalty(before)
        else:
            before = loss()
        with pytest.warns(RelflatWarning, match=r"evaluation mode: if that was a training step, call model.train"):
            before.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss().backward()

    def test_nothing_is_said_where_it_was_meant(self, net: nn.Module) -> None:
        x, y = data()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fam = FAM(CE(), net, "output", strength=1.0).eval()
            fam(net(x), y).backward()
            fam.train()
            net.train()
            net[1].eval()  # BatchNorm alone
            fam(net(x), y).backward()
            assert fam.last["kappa"] > 0
            fam.close()
            net.eval()
            fam(net(x), y).backward()


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


def test_the_layer_whose_kappa_is_not_finite_is_named() -> None:
    guards = Guards()
    values = {"first": torch.ones(2), "second": torch.tensor([1.0, float("inf")], dtype=torch.float64)}
    with pytest.warns(RelflatWarning, match="'second' is inf at step 3"):
        assert guards.judge(torch.tensor(float("inf")), values, 3) is None
    assert guards.skipped == 1
    one = torch.ones(())
    assert guards.judge(one, {"first": torch.ones(2)}, 4) is one
    assert guards.judge(one, {}, 4) is one


def overflowing(net: nn.Sequential, x: torch.Tensor, layer: str) -> torch.Tensor:
    """Have the kappa of layers overflow in float32, in the middle of it too, while the network stays what it is."""
    with torch.no_grad():
        if layer in ("4", "*"):
            net[4].weight.mul_(1e30), net[2].weight.mul_(1e-30), net[2].bias.mul_(1e-30)
        if layer in ("0", "*"):
            net[0].weight.mul_(1e-30)
    return x * 1e30 if layer in ("0", "*") else x


class TestWithoutWaiting:
    """What a device that must not be waited for does by itself: the gradient is that of the task loss alone."""

    def net(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    @pytest.mark.parametrize("layer", ["4", "0", "*"])
    @pytest.mark.parametrize("options", [{}, {"gradient": "frozen"}, {"curvature": "hessian"}], ids=str)
    @pytest.mark.filterwarnings("ignore:kappa of layer")
    def test_a_penalty_that_is_not_finite_sends_nothing_back(self, layer, options, monkeypatch) -> None:
        monkeypatch.setattr("relflat.guards.waits", lambda x: True)
        (x, y), net = data(), self.net()
        fam = FAM(CE(), net, layer, strength=1.0, seed=0, **options)
        fam(net(x), y)
        assert fam.last["skipped"] == 0
        x = overflowing(net, x, layer)
        out = net(x)
        want = [CE()(out, y), *torch.autograd.grad(CE()(out, y), list(net.parameters()))]
        with pytest.warns(RelflatWarning, match="was not finite.*left out"):
            for _ in range(11):
                loss = fam(net(x), y)
            assert fam.last["skipped"] == 11
        assert all(bool(g.isfinite().all()) for g in want)
        torch.testing.assert_close([loss, *torch.autograd.grad(loss, list(net.parameters()))], want, rtol=0, atol=0)
        assert fam.last["penalty"] == 0

    def test_one_that_is_finite_is_as_it_is_where_it_is_looked_at(self, monkeypatch) -> None:
        (x, y), found = data(), []
        for waits in (False, True):
            monkeypatch.setattr("relflat.guards.waits", lambda _, waits=waits: waits)
            net = self.net()
            fam = FAM(CE(), net, "*", strength=1.0, seed=0)
            loss = fam(net(x), y)
            found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
        torch.testing.assert_close(*found, rtol=0, atol=0)
        assert fam.last["skipped"] == 0
