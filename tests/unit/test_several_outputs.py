"""Losses of several outputs: the Gauss-Newton matrix is that of all of them together."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relflat.errors import GraphError, LossError
from unbounded import FAM


class Heads(nn.Module):
    """A linear trunk and two heads, their outputs in some structure."""

    def __init__(self, pack) -> None:
        super().__init__()
        self.pack, self.trunk = pack, nn.Linear(4, 5)
        self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> object:
        h = self.trunk(x)
        return self.pack(self.one(h), self.two(h), h)


PACKED = {  # how the outputs are returned, and found again
    "dict": (lambda a, b, h: {"a": a, "b": b}, lambda o: (o["a"], o["b"])),
    "tuple": (lambda a, b, h: (a, [b]), lambda o: (o[0], o[1][0])),
    "with hidden states": (lambda a, b, h: {"a": a, "b": b, "hidden": h}, lambda o: (o["a"], o["b"])),
    "cut out of one": (lambda a, b, h: torch.cat([a, b], 1).split((3, 2), 1), lambda o: o),
}


@pytest.fixture(autouse=True)
def in_double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(8, 4), torch.randint(3, (8,)), torch.randn(8, 2)


def on_paper(net: Heads, x: Tensor, scale: float = 0.5) -> float:
    """``sum_p ||x_p||^2 Tr(W' A_p W)``, ``A_p = V1' (diag p - p p') V1 / n + scale V2' V2 2 / (n d)``."""
    with torch.no_grad():
        w, v1, v2, total = net.trunk.weight, net.one.weight, net.two.weight, 0.0
        for row, p in zip(x, net.one(net.trunk(x)).softmax(1), strict=True):
            a = v1.T @ (p.diag() - p.outer(p)) @ v1 / len(x) + scale * v2.T @ v2 * 2 / (2 * len(x))
            total += float(row.square().sum() * (w.T @ a @ w).trace())
    return total


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("by_penalty", [False, True])
def test_kappa_of_a_trunk_under_two_heads(name: str, by_penalty: bool) -> None:
    pack, unpack = PACKED[name]
    net, (x, y, t) = Heads(pack), batch()

    def loss(outputs: object, y: Tensor, t: Tensor) -> Tensor:
        one, two = unpack(outputs)
        return F.cross_entropy(one, y) + 0.5 * F.mse_loss(two, t)

    fam = FAM(loss, net, "trunk", strength=1.0, method="exact")
    found = net(x)
    _ = fam.penalty(loss(found, y, t)) if by_penalty else fam(found, y, t)
    assert fam.last["kappa"] == pytest.approx(on_paper(net, x), rel=1e-10)


def test_nothing_chosen_trains_two_heads() -> None:
    net, (x, y, t) = Heads(PACKED["dict"][0]), batch()
    fam = FAM(lambda o, y, t: F.cross_entropy(o["a"], y) + 0.5 * F.mse_loss(o["b"], t), net)
    fam(net(x), y, t).backward()
    assert set(fam.layers) == {"trunk", "one", "two"}
    assert min(fam.last["by_layer"].values()) > 0


def test_two_passes_behind_one_loss() -> None:
    """As of a discriminator: real and made samples, each with its own pass."""
    net, (x, y, _) = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), batch()
    fam = FAM(None, net, "0", strength=1.0, method="exact")
    real, made = net(x), net(x[:4] + 1)
    fam.penalty(F.cross_entropy(real, y) + F.cross_entropy(made, y[:4]))
    want = 0.0
    with torch.no_grad():
        for rows in (x, x[:4] + 1):
            for row, p in zip(rows, net(rows).softmax(1), strict=True):
                a = net[1].weight.T @ (p.diag() - p.outer(p)) @ net[1].weight / len(rows)
                want += float(row.square().sum() * (net[0].weight.T @ a @ net[0].weight).trace())
    assert fam.last["kappa"] == pytest.approx(want, rel=1e-10)


def test_an_output_that_leads_to_another_is_refused() -> None:
    net, (x, y, _) = Heads(lambda a, b, h: {"a": a, "hidden": h}), batch()
    fam = FAM(lambda o, y: F.cross_entropy(o["a"], y) + o["hidden"].square().sum(), net, "trunk", strength=1.0)
    with pytest.raises(GraphError, match="one of them leads to another"):
        fam(net(x), y)


class Foreign(torch.autograd.Function):
    """A square whose second derivative is not what it says."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, v):
        return 2 * ctx.saved_tensors[0].detach() * v


def test_a_derivative_of_somebodys_own_is_not_believed() -> None:
    net, (x, y, _) = Heads(PACKED["tuple"][0]), batch()
    fam = FAM(lambda o, y: F.cross_entropy(o[0], y) + Foreign.apply(o[1][0]).sum(), net, "trunk", strength=1.0)
    with pytest.raises(LossError, match=r"Foreign.*may be wrong"):
        fam(net(x), y)
