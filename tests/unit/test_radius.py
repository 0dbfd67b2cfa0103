"""A finite radius: its noise ends with the criterion, and a draw of zero is harmless."""

import gc

import pytest
import torch
from small import data, mlp
from torch import nn

from unbounded import FAM

CE = nn.CrossEntropyLoss


def test_dropping_the_criterion_stops_its_noise_at_once() -> None:
    net, (x, _) = mlp(), data()
    clean = net(x)
    gc.disable()
    try:
        fam = FAM(CE(), net, "0", strength=1.0, radius=0.5)
        assert not torch.equal(net(x), clean)
        del fam
        assert torch.equal(net(x), clean)
    finally:
        gc.enable()


def test_a_draw_of_exactly_zero_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = nn.Linear(1, 3), torch.randint(3, (8,))
    monkeypatch.setattr("relflat.rng.Rng.normal", lambda self, like: torch.zeros_like(like))
    fam = FAM(CE(), net, "output", strength=1.0, radius=0.5)
    assert torch.isfinite(fam(net(torch.randn(8, 1)), y))
