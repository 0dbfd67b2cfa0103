"""Hooks and records: none without a criterion that needs them, none kept in evaluation mode."""

import pytest
import torch
from small import data, mlp
from torch import nn

from unbounded import FAM

CE = nn.CrossEntropyLoss


def test_a_criterion_in_evaluation_mode_keeps_nothing() -> None:
    net, (x, y) = mlp(), data()
    fam = FAM(CE(), net, "output", strength=1.0)
    fam.eval()
    for _ in range(20):
        fam(net(x), y)
    assert fam._tap.pending == 0
    fam.train()
    fam(net(x), y)


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
