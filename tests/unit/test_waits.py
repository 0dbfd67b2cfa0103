"""A usual training step never waits for the device: nothing that is computed there is looked at.

On a GPU PyTorch itself says where a program waits. On a CPU whatever makes a number of Python out of a tensor is
counted, and the library is told that looking would wait, as it does anywhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from relflat import FAM, guards

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOOKS = (
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "item",
    "nonzero",
    "equal",
    "allclose",
)  # tolist is the draw's


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        block = nn.TransformerEncoderLayer(16, 2, 32, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.output = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.output(self.encoder(self.embedding(x)).mean(1))


def mlp() -> tuple[nn.Module, Tensor, Any]:
    return (
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)),
        torch.randn(8, 5),
        "*",
    )


def cnn() -> tuple[nn.Module, Tensor, Any]:
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
    ]
    return (
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
        torch.randn(8, 1, 10, 10),
        "*",
    )


def transformer() -> tuple[nn.Module, Tensor, Any]:
    return Transformer(), torch.randint(20, (8, 6)), ["*linear?", "output"]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where the block waits for the device, or would."""
    found: list[str] = []
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with monkeypatch.context() as patch:
        for owner in (Tensor, torch):
            for name in LOOKS:
                if (original := getattr(owner, name, None)) is not None:
                    patch.setattr(owner, name, lambda *a, f=original, n=name, **k: found.append(n) or f(*a, **k))
        yield found


@pytest.mark.parametrize(
    "options", [{}, {"every": 2}, {"gradient": "frozen"}, {"layers_per_step": 1}, {"layer": "output"}]
)
@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_no_usual_step_waits(make, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "waits", lambda x: True)
    torch.manual_seed(0)
    net, x, layers = make()
    net, x, y = net.to(DEVICE), x.to(DEVICE), torch.randint(4, (8,)).to(DEVICE)
    fam = FAM(nn.CrossEntropyLoss(), net, **{"layer": layers, "strength": 0.1, "seed": 0} | options)

    def step() -> None:
        fam(net(x), y).backward()

    for _ in range(30 if "layers_per_step" in options else 4):  # until every layer was drawn once
        step()
    with counted(monkeypatch) as seen:
        for _ in range(12):
            step()
    assert seen == []
    assert fam.last["skipped"] == 0


def test_looks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, device=DEVICE)
    if DEVICE == "cuda":
        with pytest.raises(RuntimeError, match="synchroniz"), counted(monkeypatch):
            bool(x[0])
    else:
        with counted(monkeypatch) as seen:
            bool(x[0]), x[0].item(), float(x[0]), int(x[0]), torch.equal(x, x), x.nonzero()
        assert seen == ["__bool__", "item", "__float__", "__int__", "equal", "nonzero"]
