"""What measuring kappa of the output layer costs, relative to one evaluation pass over the same batches.

    python benchmarks/measure_cost.py

The data are all 60 000 training images of Fashion-MNIST (``relflat data get fashion-mnist``), the network is the
lab's small CNN after a short training. The evaluation pass computes accuracy and loss in evaluation mode without
gradients. Both go through the same list of batches in turns, in one process. ``--profile`` says which operations
the measurement adds.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn, optim
from torch.profiler import ProfilerActivity, profile

from output import RESULTS, environment, save, show
from paired import Times, compare
from relflat import Flatness, relative_flatness
from relflat.lab.data import Arrays, read
from relflat.lab.data.batches import in_order
from relflat.lab.tasks.models import small_cnn

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Options:
    """Cost of measuring kappa of the output layer relative to one evaluation pass.

    Attributes:
        passes: timed passes of each kind.
        batch: images a batch.
        train_steps: steps of training first, so that kappa is that of a network that knows something.
        threads: threads of torch; 0 for its own choice.
        profile: print the operations that the measurement adds.
        json: where to write the results.
    """

    passes: int = 30
    batch: int = 1000
    train_steps: int = 400
    threads: int = 0
    profile: bool = False
    json: Path = RESULTS / "measure_cost.json"


def train(model: nn.Module, samples: Arrays, steps: int) -> None:
    """Adam for some steps on batches of 64."""
    optimizer, loss_fn = optim.Adam(model.parameters(), lr=2e-3), nn.CrossEntropyLoss()
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    for index in islice(order.split(64), steps):
        optimizer.zero_grad()
        loss_fn(model(samples.inputs[index]), samples.targets[index]).backward()
        optimizer.step()


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and mean loss: the plain evaluation pass."""
    loss_fn = nn.CrossEntropyLoss()
    right, total, samples = 0, 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(inputs)
            right += int((logits.argmax(1) == targets).sum())
            total += float(loss_fn(logits, targets)) * len(targets)
            samples += len(targets)
    return {"accuracy": right / samples, "loss": total / samples}


def measure(model: nn.Module, batches: Batches) -> Flatness:
    """Kappa of the output layer over the batches."""
    return relative_flatness(model, nn.CrossEntropyLoss(), batches, layer="output")


def added_operations(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Milliseconds of own processor time by operation, measurement less evaluation, largest first."""
    measured, evaluated = (_own_time(lambda f=f: f(model, batches)) for f in (measure, evaluate))
    added = {name: (own - evaluated.get(name, 0.0)) / 1000 for name, own in measured.items()}
    return dict(sorted(added.items(), key=lambda item: -abs(item[1])))


def _own_time(call: Any) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        call()
    return {event.key: event.self_cpu_time_total for event in watch.key_averages()}


def print_times(times: dict[str, Times]) -> None:
    columns = ("60 000 images", "wall time", "processor time", "s")
    cells = [[name, str(t.wall), str(t.processor), f"{t.wall.seconds:.3f}"] for name, t in times.items()]
    show("Measuring kappa of the output layer, relative to evaluating", columns, cells)


def main() -> None:
    options = tyro.cli(Options)
    if options.threads:
        torch.set_num_threads(options.threads)
    where, samples = environment(), read("fashion-mnist").pool
    torch.manual_seed(0)
    model = small_cnn()
    train(model, samples, options.train_steps)
    batches = list(in_order(samples, torch.device("cpu"), options.batch))
    evaluation, flatness = evaluate(model, batches), measure(model, batches)
    passes = {
        "evaluate": lambda: evaluate(model, batches),
        "evaluate again": lambda: evaluate(model, batches),
        "measure kappa": lambda: measure(model, batches),
    }
    times = compare(passes, options.passes)
    print_times(times)
    print(f"accuracy {evaluation['accuracy']:.4f}, kappa {flatness.value:.6g} ({flatness.method})")
    if options.profile:
        rows = list(added_operations(model, batches).items())[:15]
        show("Own time the measurement adds", ("operation", "ms"), [[k, f"{v:.2f}"] for k, v in rows])
    save(
        options.json,
        {
            "environment": where,
            "images": len(samples),
            "batch": options.batch,
            "evaluation": evaluation,
            "flatness": asdict(flatness),
            "times": {name: asdict(t) for name, t in times.items()},
        },
    )
    print(f"written: {options.json}")


if __name__ == "__main__":
    main()
