"""Weights that are frozen, parametrised, computed by other layers or adapted by LoRA."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import CE, CLASSES, IN, Family, N, Net, image
from checks import EachArchitecture
from dense import Dense
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from relflat import relative_flatness
from unbounded import FAM

architecture = Family()


@architecture("0", "2", "4")
def everything_frozen_but_the_head() -> nn.Module:
    net = nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    net[:4].requires_grad_(False)
    return net


@architecture("body.0")
def frozen_tail() -> nn.Module:
    net = Net(
        lambda m, x: m.tail(m.body(x)),
        body=nn.Sequential(nn.Linear(IN, 3), nn.Tanh()),
        tail=nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, CLASSES)),
    )
    net.tail.requires_grad_(False)
    return net


@architecture("fc", "head")
def weight_norm_parametrization() -> nn.Module:
    fc = parametrizations.weight_norm(nn.Linear(IN, 3))
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=fc, head=nn.Linear(3, CLASSES))


@architecture("fc", "conv", x=image(1, 3))
def weight_norm_by_hooks() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fc, conv = nn.utils.weight_norm(nn.Linear(4, 3)), nn.utils.weight_norm(nn.Conv1d(1, 2, 2))
    return Net(
        lambda m, x: m.head(m.fc(m.conv(x).tanh().flatten(1)).tanh()), fc=fc, conv=conv, head=nn.Linear(3, CLASSES)
    )


@architecture("fc", "head")
def spectral_norm_in_training() -> nn.Module:
    fc = parametrizations.spectral_norm(nn.Linear(IN, 3))
    for vector in fc.parametrizations.weight[0].buffers():
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))  # far from converged
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=fc, head=nn.Linear(3, CLASSES))


@architecture("fc")
def orthogonal_parametrization() -> nn.Module:
    fc = parametrizations.orthogonal(nn.Linear(IN, 3))
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=fc, head=nn.Linear(3, CLASSES))


class Positive(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


@architecture("conv", "head", x=image(1, 4))
def parametrization_of_our_own() -> nn.Module:
    conv = nn.Conv1d(1, 2, 2)
    parametrize.register_parametrization(conv, "weight", Positive())
    return Net(lambda m, x: m.head(m.conv(x).tanh().flatten(1)), conv=conv, head=nn.Linear(6, CLASSES))


def hypernet() -> nn.Module:
    fc = nn.Linear(IN, 3)
    del fc.weight

    def run(m: Any, x: Tensor) -> Tensor:
        m.fc.weight = m.generator(m.code).reshape(3, IN)
        return m.head(m.fc(x).tanh())

    net = Net(run, fc=fc, generator=nn.Linear(1, 3 * IN), head=nn.Linear(3, CLASSES))
    net.code = nn.Parameter(torch.ones(1))
    return net


@architecture("fc", weight=lambda m: m.generator(m.code).reshape(3, IN))
def hypernetwork() -> nn.Module:
    """The weight of ``fc`` is the output of another layer."""
    return hypernet()


@architecture("generator")
def generator_of_a_hypernetwork() -> nn.Module:
    return hypernet()


class LoRA(nn.Module):
    """A dense layer with adapters, as ``peft`` wraps it."""

    def __init__(self, base: nn.Linear, ranks: dict[str, int]) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({k: nn.Linear(base.in_features, r, bias=False) for k, r in ranks.items()})
        self.lora_B = nn.ModuleDict({k: nn.Linear(r, base.out_features, bias=False) for k, r in ranks.items()})
        self.scaling = {k: 2.0 / r for k, r in ranks.items()}
        self.active_adapters = list(ranks)
        self.disable_adapters = self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        z = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return z
        for k in self.active_adapters:
            z = z + self.lora_B[k](self.lora_A[k](x)) * self.scaling[k]
        return z


@architecture("fc", "head")
def lora_adapters() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x).tanh()),
        fc=LoRA(nn.Linear(IN, 3), {"a": 1, "b": 2}),
        head=LoRA(nn.Linear(3, CLASSES), {"a": 1}),
    )


class TestComputedWeights(EachArchitecture):
    family = architecture


def test_adapters_on_a_frozen_base_can_be_trained_by_their_weight() -> None:
    net = lora_adapters().double()
    x, y = torch.randn(N, IN).double(), torch.tensor([0, 2, 1, 1, 0])
    fam = FAM(CE, net, "fc", strength=1.0, gradient="weights")
    outputs = net(x)
    added = fam(outputs, y) - CE(outputs, y)
    factors = [net.fc.lora_B["a"].weight, net.fc.lora_A["a"].weight]
    assert all(bool(g.any()) for g in torch.autograd.grad(added, factors))


@pytest.mark.parametrize("switch", ["disable_adapters", "merged"])
def test_adapters_that_are_off_add_nothing(switch: str) -> None:
    net = lora_adapters().double()
    setattr(net.fc, switch, True)
    x, y = torch.randn(N, IN).double(), torch.tensor([0, 2, 1, 1, 0])
    plain = Net(net.run, fc=net.fc.base_layer, head=net.head)
    plain.fc.weight.requires_grad_()
    want = Dense(plain, "fc", lambda m: m(x)).kappa(lambda z: CE(z, y)).item()
    flat = relative_flatness(net, CE, (x, y), layer="fc", method="exact")
    assert flat.value == pytest.approx(want, rel=1e-9)
