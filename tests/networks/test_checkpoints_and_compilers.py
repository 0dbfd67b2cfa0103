"""Activation checkpointing and compiled parts."""

from typing import Any

import torch
from architectures import CE, CLASSES, IN, Family, N, Net
from checks import EachArchitecture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unbounded import FAM

architecture = Family()


@architecture("one.0", "two.0")
def checkpointing_around_the_layer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = checkpoint(m.one, x, use_reentrant=False)
        return m.head(checkpoint(m.two, x, use_reentrant=False))

    block = lambda: nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Dropout(0.2))
    return Net(run, one=block(), two=block(), head=nn.Linear(IN, CLASSES))


@architecture("fc")
def checkpointing_around_the_tail() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return checkpoint(m.tail, m.fc(x), use_reentrant=False)

    tail = nn.Sequential(nn.Tanh(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, CLASSES))
    return Net(run, fc=nn.Linear(IN, 3), tail=tail)


@architecture("block.0")
def checkpointing_around_a_frozen_block() -> nn.Module:
    net = Net(
        lambda m, x: m.head(checkpoint(m.block, x, use_reentrant=False)),
        block=nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid()),
        head=nn.Linear(3, CLASSES),
    )
    net.block.requires_grad_(False)
    return net


@architecture("fc", "head")
def compiled_trunk() -> nn.Module:
    trunk = nn.Sequential(nn.Linear(IN, 4), nn.Tanh())
    return Net(
        lambda m, x: m.head(m.fc(m.compiled(x)).tanh()),
        compiled=torch.compile(trunk, backend="aot_eager"),
        fc=nn.Linear(4, 3),
        head=nn.Linear(3, CLASSES),
    )


class TestCheckpointsAndCompilers(EachArchitecture):
    family = architecture


def test_a_checkpointed_model_leaves_no_record_behind() -> None:
    net = nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    fam = FAM(CE, net, "0", strength=1.0, curvature="hessian", method="exact")
    x, y = torch.randn(N, IN), torch.tensor([0, 2, 1, 1, 0])
    for _ in range(12):
        fam(checkpoint(net, x, use_reentrant=False), y).backward()
    assert fam.last["method"] == "exact"
