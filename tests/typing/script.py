"""A user's typed program: `mypy --strict` and pyright must take it as it stands, and it runs."""

from collections.abc import Iterator
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import relflat
from relflat import FAM, Estimate, Flatness, RelflatError
from relflat.plot.shown import ByLayer
from relflat.theory.measures import Measures
from relflat.theory.suggest import Suggestion

Batch = tuple[Tensor, Tensor]


class Small(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        found: Tensor = self.output(torch.tanh(self.hidden(x)))
        return found


def batches() -> Iterator[Batch]:
    """Two of twenty samples."""
    for _ in range(2):
        yield torch.randn(20, 6), torch.randint(3, (20,))


def trained(model: nn.Module, data: list[Batch]) -> float:
    """Kappa of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with FAM(nn.CrossEntropyLoss(), model, layer="output", strength=0.01) as criterion:
        for inputs, targets in data:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(inputs), targets)
            torch.autograd.backward(loss)  # loss.backward() is untyped in torch
            optimizer.step()
        last: float = criterion.last["kappa"]
    return last


def measured(model: nn.Module, data: list[Batch]) -> dict[str, float]:
    """What the library says of a model."""
    loss = nn.CrossEntropyLoss()
    flat = assert_type(relflat.relative_flatness(model, loss, data, layer="output", curvature="ggn"), Flatness)
    by_layer = assert_type(relflat.relative_flatness_by_layer(model, loss, data, layer="*", probes=4), ByLayer)
    sharpest = assert_type(max(by_layer.values(), key=lambda one: one.value), Flatness)
    table: dict[str, Any] = by_layer.to_dict()
    suggestion = assert_type(relflat.suggest(model, loss, data), Suggestion)
    found = assert_type(relflat.measures(model, loss, data), Measures)
    largest = assert_type(found["kappa"], Estimate)
    monitor = relflat.Monitor(model, loss, data, layer="*", every=2, log=lambda numbers, step: None)
    seen = [step for step in range(4) if assert_type(monitor(step), ByLayer | None) is not None]
    print(flat, suggestion, found, largest, sorted(table), seen)
    return {"kappa": float(flat), "stderr": flat.stderr, "sharpest": sharpest.value, "total": by_layer.total}


def main() -> None:
    """Train and measure; an error of the library has a class of its own."""
    torch.manual_seed(0)
    model, data = Small(), list(batches())
    print(trained(model, data))
    print(measured(model, data))
    try:
        relflat.relative_flatness(model, nn.CrossEntropyLoss(), data, layer="none")
    except RelflatError as error:
        print(error)


if __name__ == "__main__":
    main()
