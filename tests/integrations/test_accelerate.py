"""FAM with Accelerate: an ordinary criterion, whatever the accelerator does to loss, model and precision."""

import pytest
import torch
from tiny import assert_same, data, gradients, mlp, plain_gradient
from torch import nn

accelerate = pytest.importorskip("accelerate")

from relflat.integrations.accelerate import prepare_fam


def trained(batches: int, dtype=torch.float64, **options) -> tuple[list[torch.Tensor], dict]:
    """The example of docs/integrations/accelerate.md, for one optimiser step."""
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=batches, cpu=True, **options)
    model, (x, y) = mlp(dtype), data(dtype)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    criterion = prepare_fam(accelerator, nn.CrossEntropyLoss(), model, "output", strength=0.5)
    for inputs, targets in zip(x.chunk(batches), y.chunk(batches), strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(inputs), targets))
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    return found, criterion.last


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_full_batch(batches, dtype) -> None:
    found, last = trained(batches, dtype)
    assert last["method"] == "closed_form"
    assert_same(found, plain_gradient(dtype=dtype), dtype)


def test_bf16_keeps_the_closed_form() -> None:
    found, last = trained(1, torch.float32, mixed_precision="bf16")
    assert last["method"] == "closed_form"
    for mine, other in zip(found, plain_gradient(dtype=torch.float32), strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.02)


@pytest.fixture(autouse=True)
def _new_state():
    """Accelerate keeps the settings of the first Accelerator for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
