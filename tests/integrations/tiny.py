"""Small networks and data that every integration is tried on, and FAM in a plain loop to compare with."""

import torch
from torch import Tensor, nn

from unbounded import FAM

SAMPLES = 16


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (SAMPLES,), generator=generator)


def plain_gradient(layer: str = "output", strength: float = 0.5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One process, all samples in one batch."""
    model, (x, y) = mlp(dtype), data(dtype)
    with FAM(nn.CrossEntropyLoss(), model, layer, strength=strength) as criterion:
        criterion(model(x), y).backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-6}


def assert_same(mine: list[Tensor], other: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance(dtype))


def assert_bitwise(mine: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
