"""A small network in float64 and its data."""

import torch
from torch import nn


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *between, nn.ReLU(), nn.Linear(6, 3)).double()


def data(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g)
