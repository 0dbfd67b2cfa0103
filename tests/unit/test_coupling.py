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
