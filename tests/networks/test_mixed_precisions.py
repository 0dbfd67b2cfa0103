"""Trunks and heads of different precisions."""

import torch
from architectures import CE, CLASSES, IN, Family, N, Net
from checks import EachArchitecture
from torch import nn

architecture = Family()


@architecture("fc", "head", dtype=None, precision=1e-5, x=lambda: torch.randn(N, IN).double())
def float64_trunk_and_float32_head() -> nn.Module:
    return Net(lambda m, x: m.head(m.fc(x).tanh().float()), fc=nn.Linear(IN, 3).double(), head=nn.Linear(3, CLASSES))


@architecture("fc", "head", dtype=None, precision=1e-9, x=lambda: torch.randn(N, IN))
def float32_inputs_and_float64_trunk() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x.double()).tanh()),
        fc=nn.Linear(IN, 3).double(),
        head=nn.Linear(3, CLASSES).double(),
    )


@architecture("fc", "head", dtype=torch.bfloat16, precision=0.1, loss=lambda z, y: CE(z.float(), y))
def bfloat16() -> nn.Module:
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


class TestMixedPrecisions(EachArchitecture):
    family = architecture
