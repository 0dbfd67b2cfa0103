"""Whether samples are coupled is found out again when precision or modes change."""

import pytest
import torch
from small import data, mlp
from torch import nn

from unbounded import FAM

CE = nn.CrossEntropyLoss


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


class Mixed(nn.Module):
    """Three layers with an operation of a kind after the first."""

    def __init__(self, mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.mix = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.mix(self.a(x)).tanh()).relu())


def attended(h: torch.Tensor, first: bool) -> torch.Tensor:
    """Attention over four tokens of two numbers, or over the samples."""
    q = h.reshape(len(h), 4, 2)
    q = q if first else q.transpose(0, 1)
    out = (q @ q.mT).softmax(-1) @ q
    return (out if first else out.transpose(0, 1)).reshape(len(h), 8)


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("mix", "coupled"),
    [
        (lambda h: h * h.sigmoid() + 1, False),
        (lambda h: attended(h, first=True), False),
        (lambda h: attended(h, first=False), True),
        (lambda h: torch.cat([h[:, :4], h[:, 4:].flip(1)], dim=1), False),
        (lambda h: h[torch.arange(len(h))], False),
        (lambda h: h + h.flip(0), True),
        (lambda h: h - h.mean(0), True),
        (lambda h: h * h.sum(1), True),  # as many samples as numbers
        (lambda h: h.t().reshape(8, 8).t(), False),
        (lambda h: h.view(-1).view(4, 16).cumsum(1).view(8, 8), True),
        (nn.BatchNorm1d(8), True),
        (nn.BatchNorm1d(8).eval(), False),
        (nn.GroupNorm(2, 8), False),
    ],
)
def test_what_is_known_of_operations_is_what_derivatives_say(mix, coupled: bool, curvature: str, monkeypatch) -> None:
    """By the names of operations, and again with none of them known."""
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    found = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr("relflat.estimate.coupling._RULES", {})
        fam = FAM(CE(), net := Mixed(mix), ["a", "b"], strength=1.0, curvature=curvature, seed=0)
        fam(net(x), y)
        found.append({key[0]: value for key, value in fam._estimator.memory.coupled.items() if key[0] in "ab"})
    assert found == [{"a": coupled, "b": False}] * 2


def test_that_is_looked_into_again_when_operations_change() -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    net = Mixed(torch.relu)
    fam = FAM(CE(), net, "a", strength=1.0, seed=0)
    for mix in (torch.relu, lambda h: h - h.mean(0), torch.relu):
        net.mix = mix
        fam(net(x), y)
    assert [v for k, v in fam._estimator.memory.coupled.items() if k[0] == "a"] == [False, True]
