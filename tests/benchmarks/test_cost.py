"""What FAM and the measurement promise to cost, in counted passes, operations and bytes: never in seconds."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from relflat import FAM, relative_flatness, relative_flatness_by_layer
from relflat.lab.tasks.models import small_cnn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from counting import Operations, Passes, flops, operations, passes, peak_bytes
from measure_cost import evaluate
from rows import CONTROL, OUTPUT, PLAIN, SAM_ROW, Row, Trainer, fam

SAMPLES = 2
ON_OUTPUT = [row for row in OUTPUT if row not in (PLAIN, CONTROL, SAM_ROW)]


def ready(row: Row) -> Trainer:
    trainer = Trainer(row, "resnet18", SAMPLES)
    trainer.step()  # optimiser state exists, the output layer is found
    return trainer


@cache
def plain_flops() -> int:
    return flops(ready(PLAIN).step)


@cache
def plain_peak() -> int:
    return peak_bytes(lambda: Trainer(PLAIN, "resnet18", SAMPLES))


@pytest.mark.parametrize("row", ON_OUTPUT, ids=lambda row: row.label)
def test_fam_on_the_output_layer_adds_no_pass(row: Row) -> None:
    trainer = ready(row)

    assert passes(trainer.model, trainer.step) == Passes(1, 1, 1, 1)


@pytest.mark.parametrize("row", ON_OUTPUT, ids=lambda row: row.label)
def test_fam_on_the_output_layer_adds_no_more_than_a_hundredth_of_the_operations(row: Row) -> None:
    assert plain_flops() <= flops(ready(row).step) <= 1.01 * plain_flops()


@pytest.mark.parametrize("row", ON_OUTPUT, ids=lambda row: row.label)
def test_fam_on_the_output_layer_adds_no_more_than_a_twentieth_of_the_memory(row: Row) -> None:
    assert peak_bytes(lambda: Trainer(row, "resnet18", SAMPLES)) <= 1.05 * plain_peak()


@pytest.mark.parametrize(
    ("layer", "options", "more"),
    [("output", {}, 55), ("output", {"gradient": "frozen"}, 55), ("*", {}, 150), ("*", {"every": 4}, 0)],
)
def test_fam_on_a_small_network_adds_few_operations(layer: str, options: dict[str, object], more: int) -> None:
    counts = []
    for row in (PLAIN, fam(layer, **options)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        x, y, loss_fn = torch.randn(32, 64), torch.randint(10, (32,)), nn.CrossEntropyLoss()
        criterion = loss_fn if row is PLAIN else FAM(loss_fn, net, row.layer, **row.options)

        def step(net=net, criterion=criterion, x=x, y=y) -> None:
            net.zero_grad()
            criterion(net(x), y).backward()

        for _ in range(5):
            step()
        counts.append(operations(step))
    assert counts[0] <= counts[1] <= counts[0] + more


def test_the_counters_see_what_sam_costs() -> None:
    trainer = ready(SAM_ROW)

    assert passes(trainer.model, trainer.step) == Passes(2, 2, 2, 2)
    assert flops(trainer.step) == 2 * plain_flops()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert peak_bytes(lambda: Trainer(SAM_ROW, "resnet18", SAMPLES)) >= plain_peak() + 0.5 * weights


def test_all_layers_take_little_more_than_a_pull_back_and_its_derivative() -> None:
    """And so few operations that a GPU need not wait for them."""
    trainer = ready(fam("*"))
    assert flops(trainer.step) <= 2.18 * plain_flops()  # 2.15 at a batch of 8
    with Operations() as operations:
        trainer.step()
    assert operations.total <= 1900


def test_operations_are_counted_without_views() -> None:
    x = torch.randn(3, 4)
    with Operations() as operations:
        _ = (x.T @ x).view(-1)[2:].unsqueeze(0) + 1
    assert operations.total == 2
    assert operations.counts["mm"] == 1


@pytest.mark.parametrize(("probes", "most"), [(4, 4), (16, 15)])
def test_measuring_all_layers_takes_few_training_passes(probes: int, most: int) -> None:
    """The Hessian's probes behind ReLU and BatchNorm in evaluation mode are pull-backs that serve all layers."""
    trainer = ready(PLAIN)
    one = trainer.batch[0][:1], trainer.batch[1][:1]
    run = lambda: relative_flatness_by_layer(trainer.model, nn.CrossEntropyLoss(), one, layer="*", probes=probes)
    assert flops(run) <= most * plain_flops() / SAMPLES


def test_the_counters_see_a_second_backward_pass_of_the_tail() -> None:
    trainer = Trainer(fam("fc3"), "mlp", SAMPLES)
    trainer.step()

    assert passes(trainer.model, trainer.step) == Passes(1, 1, 1, 2)


def test_a_peak_is_counted_in_bytes() -> None:
    class Allocates:
        def step(self) -> None:
            a = torch.empty(1_000_000)
            b = torch.empty(500_000)
            del a
            torch.empty(250_000)
            del b

    assert peak_bytes(Allocates) == pytest.approx(6_000_000, rel=1e-3)


def test_measuring_with_a_closed_form_is_one_forward_pass_over_the_data() -> None:
    torch.manual_seed(0)
    model, loss_fn = small_cnn(), nn.CrossEntropyLoss()
    batches = [(torch.randn(16, 1, 28, 28), torch.randint(10, (16,))) for _ in range(5)]

    def measure() -> None:
        assert relative_flatness(model, loss_fn, batches, layer="output").method == "closed_form"

    seen = passes(model, measure)

    assert seen == Passes(trunk_forward=5, trunk_backward=0, tail_forward=5, tail_backward=0)
    assert flops(measure) <= 1.01 * flops(lambda: evaluate(model, batches))
