"""Losses whose curvature vanishes, is masked away, or reaches the layer past the outputs."""

import pytest
import torch
import torch.nn.functional as F
from small import data, mlp
from torch import nn

from relflat import GraphError, RelflatWarning, relative_flatness
from unbounded import FAM


def test_a_masked_entry_does_not_poison_the_gradient() -> None:
    net, (x, _) = mlp(), data()
    mask = torch.ones(3).double()
    mask[1] = 0
    fam = FAM(nn.BCEWithLogitsLoss(weight=mask), net, "0", strength=1.0)
    fam(net(x), torch.zeros(8, 3).double()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.logits, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h = self.body(x).relu()
        return {"logits": self.logits(h), "aux": self.aux(h)}


def test_ggn_of_a_loss_that_sees_the_layer_past_the_outputs_is_refused() -> None:
    net, (x, y) = TwoHeads().double(), data()
    loss_fn = lambda o, t: F.cross_entropy(o["logits"], t) + 5 * F.cross_entropy(o["aux"], t)
    for method in ("exact", "probe"):
        with pytest.raises(GraphError, match="also past the tensor taken for the outputs"):
            relative_flatness(net, loss_fn, (x, y), layer="body", curvature="ggn", method=method)
    relative_flatness(net, loss_fn, (x, y), layer="body", curvature="hessian", method="exact")


def test_a_loss_flat_on_the_first_batch_does_not_stop_training() -> None:
    net, (x, _) = mlp(), data()
    fam = FAM(nn.HuberLoss(delta=0.1), net, "output", strength=1.0)
    far, near = torch.full((8, 3), 100.0).double(), net(x).detach()
    with pytest.warns(RelflatWarning, match="no curvature on this batch"):
        fam(net(x), far)
    fam(net(x), near)
    assert fam.last["kappa"] > 0
