"""What was found out of a model at one step is not taken for granted where a later one is another."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import Net
from test_which_layer import CE, CLASSES, IN, batch, kappa, mlp
from torch import Tensor, nn
from torch.func import functional_call

from relflat import GraphError, LayerError, LossError
from unbounded import FAM

Begin = Callable[[], Any]
pytestmark = pytest.mark.filterwarnings("ignore:kappa of layer")


def network(run: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Net(run, **{"a": nn.Linear(IN, 5), "b": nn.Linear(5, CLASSES), **parts}).double()


def gate() -> tuple[nn.Module, Any, Begin]:
    """As in ReZero: nothing comes by way of the mean over samples at first."""
    net = network(lambda m, x: m.b((h := m.a(x).relu()) + m.g.weight[0, 0] * h.mean(0)), g=nn.Linear(1, 1))
    nn.init.zeros_(net.g.weight)
    return net, CE, lambda: nn.init.ones_(net.g.weight)


def attention_over_samples() -> tuple[nn.Module, Any, Begin]:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return m.b(h + m.o((m.k @ m.k.mT).softmax(1) @ h))

    net = network(run, o=nn.Linear(5, 5))
    net.k = nn.Parameter(torch.randn(len(batch()[0]), 2).double())
    nn.init.zeros_(net.o.weight)
    return net, CE, lambda: nn.init.normal_(net.o.weight)


def pairs() -> tuple[nn.Module, Any, Begin]:
    """A contrastive hinge; no pair is near enough at first."""
    margin = [0.0]
    hinge = lambda z: (margin[0] - (z[:3] - z[3:]).square().sum(1)).relu().square().mean()
    return mlp(), lambda z, y: CE(z, y) + hinge(z), lambda: margin.__setitem__(0, 5.0)


def norm_in_the_network(layer: str) -> tuple[nn.Module, Any, Begin]:
    on = [False]
    norm = lambda m: getattr(m, layer).weight.norm() if on[0] else 1
    return network(lambda m, x: m.b(m.a(x).tanh()) / norm(m)), CE, lambda: on.__setitem__(0, True)


LATER: dict[str, tuple[Callable[[], tuple[nn.Module, Any, Begin]], str, tuple[str, ...]]] = {
    "a gate from 0": (gate, "a", ("hessian", "ggn")),
    "attention over samples": (attention_over_samples, "a", ("hessian", "ggn")),
    "pairs": (pairs, "0", ("hessian",)),
    "pairs of outputs": (pairs, "2", ("hessian", "ggn")),
    "a norm of the weight": (lambda: norm_in_the_network("a"), "a", ("hessian",)),
    "a norm of the last weight": (lambda: norm_in_the_network("b"), "b", ("hessian",)),
}


@pytest.mark.parametrize(("name", "curvature"), [(name, c) for name in LATER for c in LATER[name][2]])
def test_kappa_is_right_from_the_step_on_where_it_begins(name: str, curvature: str) -> None:
    """GGN and Hessian are one in those that are asked for both: piecewise linear after the layer."""
    build, layer, _ = LATER[name]
    (net, loss, begin), (x, y) = build(), batch()
    with FAM(loss, net, layer, strength=1.0, curvature=curvature, method="exact") as fam:
        fam(net(x), y)
        begin()
        fam(net(x), y)
        want = kappa(net.get_submodule(layer).weight, lambda: loss(net(x), y))
    assert fam.last["kappa"] == pytest.approx(want, rel=1e-8)


def test_a_part_of_the_loss_past_the_outputs_is_refused_when_it_comes() -> None:
    on, (x, y) = [False], batch()

    def run(m: Any, x: Tensor) -> Tensor:
        m.seen = m.a(x).tanh()
        return m.b(m.seen)

    net = network(run)
    loss = lambda z, y: CE(z, y) + z.square().mean() + (net.seen.square().square().mean() if on[0] else 0)
    with FAM(loss, net, "a", strength=1.0, method="exact") as fam:
        fam(net(x), y)
        on[0] = True
        with pytest.raises(GraphError, match="past the tensor taken for the outputs"):
            fam(net(x), y)


class Fused(torch.autograd.Function):
    """Its gradient is made in the forward pass, so that autograd takes it for a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(4 * z.detach() ** 3)
        return (z.detach() ** 4).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


@pytest.mark.parametrize("gradient", ["full", "frozen"])
def test_a_fused_term_of_the_loss_is_seen_when_it_comes(gradient: str) -> None:
    on, net, (x, y) = [False], mlp(), batch()
    loss = lambda z, y: CE(z, y) + (Fused.apply(z) if on[0] else (z**4).sum())
    want = kappa(net[0].weight, lambda: loss(net(x), y))
    with FAM(loss, net, "0", strength=1.0, curvature="hessian", method="exact", gradient=gradient) as fam:
        for on[0] in (False, True):
            if gradient == "full" and on[0]:
                with pytest.raises(LossError, match="gradient='frozen'"):
                    fam(net(x), y)
            else:
                fam(net(x), y)
                assert fam.last["kappa"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("layer", ["0.weight", "*"])
@pytest.mark.parametrize("how", ["assign=True", "a new parameter", "another size"])
def test_a_parameter_that_takes_the_place_of_another(layer: str, how: str) -> None:
    net, (x, y) = mlp(), batch()
    fam = FAM(CE, net, layer, strength=1.0, curvature="hessian", method="exact")
    fam(net(x), y)
    if how == "assign=True":
        net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}, assign=True)
    else:
        d = 5 if how == "a new parameter" else 7
        net[0].weight, net[0].bias = nn.Parameter(torch.randn(d, IN).double()), nn.Parameter(torch.zeros(d).double())
        net[2].weight = nn.Parameter(torch.randn(CLASSES, d).double())
    fam(net(x), y)
    want = [kappa(net[i].weight, lambda: CE(net(x), y)) for i in ((0, 2) if layer == "*" else (0,))]
    assert fam.last["kappa"] == pytest.approx(sum(want), rel=1e-9)


@pytest.mark.parametrize("calls", [1, 2])
def test_weights_put_in_place_for_a_call(calls: int) -> None:
    """Kappa of a dense layer is that of the weight it ran with; where it is taken in the module's weight, refused."""
    run = lambda m, x: m.b(m.a(m.a(x).tanh() if calls == 2 else x).tanh())
    net, (x, y) = network(run, a=nn.Linear(IN, IN), b=nn.Linear(IN, CLASSES)), batch()
    given = dict(net.named_parameters())
    slopes = torch.autograd.grad(CE(functional_call(net, given, (x,)), y), given.values(), create_graph=True)
    moved = {name: p - 0.5 * g for (name, p), g in zip(given.items(), slopes, strict=True)}
    fam = FAM(CE, net, "a", strength=1.0, curvature="hessian", method="exact")
    out = functional_call(net, moved, (x,))
    if calls == 2:
        with pytest.raises(LayerError, match=r"another weight in the place of its own \(functional_call\)"):
            fam(out, y)
        return
    fam(out, y)
    other = copy.deepcopy(net)
    other.load_state_dict({name: p.detach() for name, p in moved.items()})
    want = kappa(other.a.weight, lambda: CE(other(x), y))
    assert fam.last["kappa"] == pytest.approx(want, rel=1e-9)


class Masked(nn.Linear):
    """Its first sample is as its class says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mask


@pytest.mark.parametrize("later", [False, True])
def test_all_samples_tell_what_a_layer_computes(later: bool) -> None:
    net, (x, y) = mlp(layer=Masked(IN, 5)), batch()
    mask = torch.ones(len(x), 1).double()
    mask[-2:] = 0.5
    net[0].mask = torch.ones_like(mask) if later else mask
    fam = FAM(CE, net, "0", strength=1.0, curvature="hessian", method="exact")
    fam(net(x), y)
    net[0].mask = mask
    for _ in range(len(x) if later else 1):  # two samples a step are looked at
        fam(net(x), y)
    assert fam.last["kappa"] == pytest.approx(kappa(net[0].weight, lambda: CE(net(x), y)), rel=1e-9)
    assert fam.last["method"] == "exact(weight)"


class Sorted(nn.Module):
    """Samples in another order inside, as for packed sequences."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.back = nn.Linear(IN, 5), nn.Linear(5, CLASSES), back

    def forward(self, x: Tensor) -> Tensor:
        order = torch.tensor([2, 0, 1, 5, 3, 4])
        return self.b(self.a(x[order]).tanh())[order.argsort()] if self.back else self.b(self.a(x).tanh())


@pytest.mark.parametrize("layer", ["a", "b"])
@pytest.mark.parametrize("back", [False, True])
def test_shares_of_samples_are_in_the_order_of_the_losses_or_refused(layer: str, back: bool) -> None:
    net, (x, y) = Sorted(back).double(), batch()
    each = nn.CrossEntropyLoss(reduction="none")
    fam = FAM(each, net, layer, strength=1.0, curvature="hessian", method="exact")
    z = net(x)
    if back:
        with pytest.raises(LossError, match="has 1 shares"):
            fam(z, y)
        return
    weight = net.get_submodule(layer).weight
    want = [kappa(weight, lambda i=i: F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])) for i in range(len(x))]
    assert (fam(z, y) - each(z, y)).tolist() == pytest.approx(want, rel=1e-8)
