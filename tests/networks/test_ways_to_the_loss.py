"""All ways from a weight to the loss, parameters as matrices, and samples that mix from some step on."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import Net
from test_layers import conv1d_of_gpt2
from test_which_layer import CE, CLASSES, IN, N, batch, by_differences, kappa, mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from relflat import GraphError, LayerError, relative_flatness
from unbounded import FAM

Loss = Callable[[nn.Module, Any, Tensor], Tensor]


def l2(net: nn.Module, out: Tensor, y: Tensor) -> Tensor:
    return CE(out, y) + 0.1 * sum(p.square().sum() for p in net.parameters())


def norms(net: nn.Module, out: Tensor, y: Tensor) -> Tensor:
    return CE(out, y) + 0.1 * sum(p.norm() for p in net.parameters() if p.ndim > 1)


def orthogonality(net: nn.Module, out: Tensor, y: Tensor) -> Tensor:
    return CE(out, y) + 0.1 * sum((w @ w.mT).square().sum() for w in net.parameters() if w.ndim > 1)


def gradient_penalty(net: nn.Module, out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    z, x = out
    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    return CE(z, y) + 0.5 * slope.square().sum()


def with_input(m: Any, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    return m.body(x), x


def force(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(m.body(x).square().sum(), x, create_graph=True)[0][:, :CLASSES]


def dense(make: Callable[..., nn.Module] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(make(IN, 5), nn.Tanh(), make(5, CLASSES)).double()


def gpt2() -> nn.Sequential:
    return dense(lambda m, d: conv1d_of_gpt2(d, m))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, IN)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Conv1d(2, CLASSES, 3), nn.Flatten()
    ).double()


def plain(m: Any, x: Tensor) -> Tensor:
    return m.body(x)


SITUATIONS: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module], Loss]] = {
    "weight decay": (plain, dense, l2),
    "a norm of the weight": (plain, dense, norms),
    "orthogonal weights": (plain, dense, orthogonality),
    "a gradient penalty": (with_input, dense, gradient_penalty),
    "a gradient penalty, GPT-2": (with_input, gpt2, gradient_penalty),
    "a gradient penalty, convolutions": (with_input, convolutions, gradient_penalty),
    "forces": (force, dense, lambda net, out, y: CE(out, y)),
    "forces, GPT-2": (force, gpt2, lambda net, out, y: CE(out, y)),
    "forces, convolutions": (force, convolutions, lambda net, out, y: CE(out, y)),
    "a norm in the network": (
        lambda m, x: m.body(x) / m.body[0].weight.norm() / m.body[2].weight.norm(),
        dense,
        lambda net, out, y: CE(out, y),
    ),
}


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("name", SITUATIONS)
def test_all_ways_count(name: str) -> None:
    run, build, loss_of = SITUATIONS[name]
    net, (x, y) = Net(run, body=build()).double(), batch()
    loss = lambda out, y: loss_of(net, out, y)
    for layer, module in [(n, m) for n, m in net.named_modules() if hasattr(m, "weight")]:
        view = (lambda w: w.mT) if "GPT-2" in name else (lambda w: w.flatten(1))
        want = kappa(module.weight, lambda: loss(net(x), y), view)
        flat = relative_flatness(net, loss, (x, y), layer=layer, method="exact")
        assert flat.value == pytest.approx(want, rel=1e-8)
        for use in (lambda f, z: f(z, y), lambda f, z: f.penalty(loss(z, y))):
            with FAM(loss, net, layer, strength=1.0, curvature="hessian", method="exact") as fam:
                use(fam, net(x)).backward()
            assert fam.last["kappa"] == pytest.approx(want, rel=1e-8)


def test_a_penalty_that_starts_later_is_noticed() -> None:
    net, (x, y) = mlp(), batch()
    on = [False]
    loss = lambda out, y: l2(net, out, y) if on[0] else CE(out, y)
    fam = FAM(loss, net, "0", strength=1.0, curvature="hessian", method="exact")
    for on[0] in (False, True, False):
        fam(net(x), y)
        assert fam.last["kappa"] == pytest.approx(kappa(net[0].weight, lambda: loss(net(x), y)), rel=1e-9)


def test_a_decayed_bias_changes_nothing() -> None:
    net, (x, y) = mlp(), batch()
    loss = lambda out, y: CE(out, y) + net[2].bias.square().sum()
    assert relative_flatness(net, loss, (x, y), layer="2", method="exact").method == "exact"


def test_refused_where_a_part_would_be_missing() -> None:
    net, (x, y) = mlp(), batch()
    loss = lambda out, y: l2(net, out, y)
    with pytest.raises(GraphError, match=r"penalty on the weight.*curvature='hessian'"):
        FAM(loss, net, "0", strength=1.0)(net(x), y)
    parametrizations.weight_norm(net[0])
    with pytest.raises(LayerError, match=r"'0' is computed from other parameters.*name one of those"):
        FAM(loss, net, "0", strength=1.0, curvature="hessian")(net(x), y)


def expert_by_expert(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.stack([F.linear(x, w).tanh() for w in m.P]).mean(0))


def parts_of_one(m: Any, x: Tensor) -> Tensor:
    one, two = m.P.split([2, 3])
    return m.head(torch.cat([F.linear(x, one), F.linear(x, two).exp()], 1).tanh())


# how the parameter is used, its shape, what the head takes, and the parameter as a stack of (d, m)
PARAMETERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "x @ P": (lambda m, x: m.head((x @ m.P).tanh()), (IN, 5), 5, lambda w: w.mT[None]),
    "x @ P.T": (lambda m, x: m.head((x @ m.P.T).tanh()), (5, IN), 5, lambda w: w[None]),
    "P @ x": (lambda m, x: m.head((m.P @ x.mT).mT.tanh()), (5, IN), 5, lambda w: w[None]),
    "tokens @ P": (
        lambda m, x: m.head((torch.stack([x, 2 * x], 1) @ m.P).tanh().mean(1)),
        (IN, 5),
        5,
        lambda w: w.mT[None],
    ),
    "einsum": (lambda m, x: m.head(torch.einsum("ni,io->no", x, m.P).tanh()), (IN, 5), 5, lambda w: w.mT[None]),
    "experts (e, out, in)": (
        lambda m, x: m.head(torch.einsum("eoi,ni->neo", m.P, x).tanh().mean(1)),
        (2, 5, IN),
        5,
        lambda w: w,
    ),
    "experts (e, in, out)": (
        lambda m, x: m.head((x.expand(2, -1, -1) @ m.P).tanh().mean(0)),
        (2, IN, 5),
        5,
        lambda w: w.mT,
    ),
    "experts one by one": (expert_by_expert, (2, 5, IN), 5, lambda w: w),
    "rows in parts": (parts_of_one, (5, IN), 5, lambda w: w[None]),
    "heads (in, h, out)": (
        lambda m, x: m.head(torch.einsum("ni,iho->nho", x, m.P).flatten(1).tanh()),
        (IN, 2, 2),
        4,
        lambda w: w.flatten(1).mT[None],
    ),
    "convolution": (
        lambda m, x: m.head(F.conv1d(x[:, None], m.P).tanh().flatten(1)),
        (2, 1, 3),
        4,
        lambda w: w.flatten(1)[None],
    ),
    "transposed convolution": (
        lambda m, x: m.head(F.conv_transpose1d(x.reshape(-1, 2, 2), m.P).tanh().flatten(1)),
        (2, 2, 2),
        6,
        lambda w: w.transpose(0, 1).flatten(1)[None],
    ),
    "P.mv(x)": (lambda m, x: m.head(torch.stack([m.P.mv(r) for r in x]).tanh()), (5, IN), 5, lambda w: w[None]),
    "addmv": (
        lambda m, x: m.head(torch.stack([torch.addmv(r[:1].expand(5), m.P, r) for r in x]).tanh()),
        (5, IN),
        5,
        lambda w: w[None],
    ),
    "addmm, left": (
        lambda m, x: m.head(torch.addmm(x[:, :1].mT.expand(5, -1), m.P, x.mT).mT.tanh()),
        (5, IN),
        5,
        lambda w: w[None],
    ),
    "addmm, right": (
        lambda m, x: m.head(torch.addmm(x[:, :1].expand(-1, 5), x, m.P).tanh()),
        (IN, 5),
        5,
        lambda w: w.mT[None],
    ),
    "bmm, left": (lambda m, x: m.head(m.P.bmm(x.mT.expand(2, -1, -1)).mT.tanh().mean(0)), (2, 5, IN), 5, lambda w: w),
    "baddbmm, left": (
        lambda m, x: m.head(
            torch.baddbmm(x[:, :1].mT.expand(2, 5, -1), m.P, x.mT.expand(2, -1, -1)).mT.tanh().mean(0)
        ),
        (2, 5, IN),
        5,
        lambda w: w,
    ),
    "baddbmm, right": (
        lambda m, x: m.head(torch.baddbmm(x[:, :1].expand(2, -1, 5), x.expand(2, -1, -1), m.P).tanh().mean(0)),
        (2, IN, 5),
        5,
        lambda w: w.mT,
    ),
    "embedding": (lambda m, x: m.head(F.embedding(x.argmax(1), m.P).tanh()), (IN, 5), 5, lambda w: w.mT[None]),
    "one output": (lambda m, x: m.head((x @ m.P).tanh()), (IN, 1), 1, lambda w: w.mT[None]),
    "one feature": (lambda m, x: m.head((x[:, :1] @ m.P).tanh()), (1, 5), 5, lambda w: w.mT[None]),
    "both ways": (lambda m, x: m.head((x @ m.P).tanh() @ m.P.mT), (IN, 5), IN, lambda w: w[None]),
    "added": (lambda m, x: m.head((x[:, :1, None] + m.P).tanh().flatten(1)), (2, 2), 4, lambda w: w[None]),
}


class TestParameters:
    def network(self, name: str) -> tuple[nn.Module, float]:
        run, shape, out, stack = PARAMETERS[name]
        torch.manual_seed(0)
        net, (x, y) = Net(run, head=nn.Linear(out, CLASSES)), batch()
        net.P = nn.Parameter(torch.randn(shape) / 2)
        net = net.double()
        each = [kappa(net.P, lambda: CE(net(x), y), lambda w, i=i: stack(w)[i]) for i in range(len(stack(net.P)))]
        return net, sum(each)

    @pytest.mark.parametrize("name", PARAMETERS)
    def test_what_a_product_sums_over_is_the_features(self, name: str) -> None:
        (net, want), (x, y) = self.network(name), batch()
        assert relative_flatness(net, CE, (x, y), layer="P", method="exact").value == pytest.approx(want, rel=1e-8)
        with FAM(CE, net, "*", strength=1.0) as fam:
            fam(net(x), y)
            assert ("P" in fam.layers) is (name != "added")  # what is only added is no weight of features

    @pytest.mark.parametrize("name", ["x @ P", "experts (e, in, out)"])
    def test_every_method_gives_the_same(self, name: str) -> None:
        (net, want), (x, y) = self.network(name), batch()
        flat = relative_flatness(net, CE, (x, y), layer="P", method="xtrace", probes=200)
        assert flat.value == pytest.approx(want, rel=1e-8)
        for method in ("probe", "finite_difference"):
            flat = relative_flatness(net, CE, (x, y), layer="P", method=method, probes=300)
            assert abs(flat.value - want) <= 4 * flat.stderr

    @pytest.mark.parametrize(
        ("name", "features"),
        [
            ("x @ P", (IN, 1)),
            ("P @ x", (1, IN)),
            ("experts (e, in, out)", (2, IN, 1)),
            ("experts (e, out, in)", (2, 1, IN)),
        ],
    )
    def test_the_adaptive_form_is_the_laplacian_in_the_scales_of_features(
        self, name: str, features: tuple[int, ...]
    ) -> None:
        (net, _), (x, y) = self.network(name), batch()
        of = lambda r: CE(functional_call(net, {"P": net.P * (1 + r)}, (x,)), y)
        size = math.prod(features)
        H = torch.autograd.functional.hessian(of, torch.zeros(features).double()).reshape(size, size)
        flat = relative_flatness(net, CE, (x, y), layer="P", method="exact", adaptive=True)
        assert (flat.method, flat.value) == ("exact(weight)", pytest.approx(float(H.trace()), rel=1e-8))

    @pytest.mark.parametrize(
        ("make", "x"),
        [
            (lambda: nn.Linear(IN, 5), None),
            (lambda: conv1d_of_gpt2(5, IN), None),
            (lambda: nn.Embedding(7, 5), torch.randint(7, (N,))),
            (lambda: nn.Conv1d(1, 5, IN), torch.randn(N, 1, IN).double()),
            (lambda: nn.ConvTranspose1d(2, 4, 2, groups=2), torch.randn(N, 2, 2).double()),
        ],
    )
    def test_a_module_and_its_weight_agree(self, make: Callable[[], nn.Module], x: Tensor | None) -> None:
        inputs, y = batch()
        torch.manual_seed(0)
        net = Net(lambda m, x: m.head(m.layer(x).tanh().flatten(1)), layer=make(), head=nn.LazyLinear(CLASSES))
        net.double()(inputs if x is None else x)
        one, two = (
            relative_flatness(net, CE, (inputs if x is None else x, y), layer=name, method="exact")
            for name in ("layer", "layer.weight")
        )
        assert two.value == pytest.approx(one.value, rel=1e-9)
        assert two.method == "exact(weight)"


class Mix(nn.Module):
    """Nothing at first, then samples are mixed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.on = how, False

    def forward(self, z: Tensor) -> Tensor:
        if self.how == "flip":
            return 0.5 * (z + z.flip(0)) if self.on else z
        order = torch.arange(N)  # the operations are the same from the first step on
        return 0.5 * (z + z[order.roll(1) if self.on else order])


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("how", ["flip", "permuted"])
def test_samples_that_mix_later(how: str, curvature: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, 5), nn.ReLU(), Mix(how), nn.Linear(5, CLASSES)).double()
    x, y = batch()
    fam = FAM(CE, net, "0", strength=1.0, curvature=curvature, method="exact")
    fam(net(x), y)
    net[2].on = True
    fam(net(x), y)
    want = kappa(net[0].weight, lambda: CE(net(x), y))  # the network is piecewise linear after the layer
    assert fam.last["kappa"] == pytest.approx(want, rel=1e-9)


class Overwritten(nn.Module):
    """Tokens through a dense layer, whose output is a view of a product and is written to in place."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.a, self.q, self.b = nn.Linear(IN, 4, bias=bias), nn.Parameter(torch.randn(4)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.unflatten(1, (1, -1)).expand(-1, 2, -1))
        h += self.q
        return self.b(h.tanh_().mean(1))


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_is_written_to_in_place(bias: bool) -> None:
    torch.manual_seed(0)
    net, (x, y) = Overwritten(bias=bias).double(), batch()
    want = by_differences(net.a.weight, lambda: CE(net(x), y))
    assert relative_flatness(net, CE, (x, y), layer="a", method="exact").value == pytest.approx(want, rel=1e-5)
    fam = FAM(CE, net, "*", strength=1.0, curvature="hessian", method="exact")
    fam(net(x), y).backward()
    assert fam.last["by_layer"]["a"] == pytest.approx(want, rel=1e-5)
