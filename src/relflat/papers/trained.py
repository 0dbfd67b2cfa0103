"""A network trained until its training loss is below a level: what the studies of networks compare.

Networks that end at the same training loss differ in how far they generalise, and not merely in how long they were
trained. Each network has a file of results and one of weights, so an interrupted study goes on where it stopped.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from relflat.lab.common.names import look_up
from relflat.lab.data.arrays import Arrays
from relflat.lab.data.splits import classification
from relflat.lab.tasks.models import mlp
from relflat.lab.train import store
from relflat.lab.train.checkpoint import read_weights

CHUNK = 2000  # samples at a time when evaluating


def lenet5() -> nn.Sequential:
    """LeNet-5 for 32x32 pictures of three channels, with ReLU and max-pooling; the output weight is (10, 84)."""
    blocks = {
        "conv1": nn.Conv2d(3, 6, 5),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 16, 5),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(400, 120),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(120, 84),
        "relu4": nn.ReLU(),
        "output": nn.Linear(84, 10),
    }
    return nn.Sequential(OrderedDict(blocks))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "lenet5": lenet5,
    "mlp-28x28": partial(mlp, 784, (128, 128, 128, 128)),
    "mlp-8x8": partial(mlp, 64, (32, 32, 32, 32)),
}


class Halves(NamedTuple):
    """What is trained on, and what the generalisation gap is taken on."""

    train: Arrays
    test: Arrays


@dataclass(frozen=True)
class Source:
    """Which samples of a data set: how many for training and, from the first on, for testing; None for all."""

    data: str
    train_size: int | None = None
    test_size: int | None = None
    held_out: int | None = None  # samples to cut a test set from, where the data set has no official one


@dataclass(frozen=True)
class Recipe:
    """How one network is trained, by SGD with momentum 0.9 at a constant learning rate.

    Training stops after the first epoch whose training loss is below ``level``, and after ``most_epochs``.
    ``network`` is a name in ``NETWORKS``; the seed is that of the initial weights and the order of the samples.
    """

    source: Source
    network: str
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    level: float = 0.1
    most_epochs: int = 150

    @property
    def title(self) -> str:
        """How it is named in reports."""
        return f"batch {self.batch_size}, lr {self.lr:g}, weight decay {self.weight_decay:g}, seed {self.seed}"

    @property
    def digest(self) -> str:
        """Ten hexadecimal digits that stand for all values."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]


def grid(
    source: Source,
    network: str,
    *,
    batch_sizes: Sequence[int],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    seeds: Sequence[int],
    **rest: Any,
) -> list[Recipe]:
    """Every combination of the values; ``rest`` (level, most_epochs) is the same for all."""
    values = product(batch_sizes, lrs, weight_decays, seeds)
    return [Recipe(source, network, *each, **rest) for each in values]


@lru_cache(maxsize=1)
def samples(source: Source) -> Halves:
    """Read the samples; training ones standardised by themselves, test ones the same way."""
    splits = classification(
        source.data, validation=0, test=source.held_out, train_size=source.train_size, label_noise=0.0, seed=0
    )
    part = splits.test().take(slice(source.test_size))
    assert isinstance(part.inputs, Tensor)
    return Halves(splits.train, Arrays(part.inputs.clone(), part.targets.clone()))  # lets go of the rest


class Trained(NamedTuple):
    """A network in evaluation mode, with the weights it ended with, and how it got there.

    The result has ``recipe``, ``reached`` (the level), ``epochs``, ``train_loss``, ``test_loss``, ``train_accuracy``,
    ``test_accuracy`` and ``gap``, which is test loss minus train loss.
    """

    network: nn.Sequential
    result: dict[str, Any]


def trained(recipe: Recipe, folder: Path) -> Trained:
    """Train the network, or read it if that was done; the folder keeps results and weights."""
    result_file, weights = folder / f"{recipe.digest}.json", folder / f"{recipe.digest}.safetensors"
    make = look_up("network", recipe.network, NETWORKS)
    if not (result_file.is_file() and weights.is_file()):
        halves = samples(recipe.source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            fresh = he_initialised(make())
            epochs, loss = fit(fresh, recipe, halves.train)
        store.put_in_place(weights, lambda temporary: save_model(fresh, str(temporary)))
        result = {"recipe": asdict(recipe), "reached": loss < recipe.level, "epochs": epochs, **gap(fresh, halves)}
        store.write_json(result_file, result)
    with torch.random.fork_rng(devices=[]):
        network = make()
    read_weights(weights, network)
    return Trained(network.eval(), store.read_json(result_file))


@torch.no_grad()
def he_initialised(network: nn.Sequential) -> nn.Sequential:
    """Weights by He et al. (2015), biases zero; with torch's own smaller weights, small sets are slow to learn."""
    for module in network:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return network


def fit(network: nn.Sequential, recipe: Recipe, train: Arrays) -> tuple[int, float]:
    """Train until the level is reached, the epochs are over or the loss is no number; return epochs and loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    size, loss, epoch = min(recipe.batch_size, len(train)), inf, 0
    while epoch < recipe.most_epochs and not loss < recipe.level:
        order = torch.randperm(len(train))
        for start in range(0, len(train) - size + 1, size):
            batch = train.take(order[start : start + size])
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch.inputs), batch.targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        epoch += 1
        loss = evaluate(network, train)[0]
        if not isfinite(loss):
            break
    return epoch, loss


@torch.no_grad()
def evaluate(network: nn.Module, part: Arrays) -> tuple[float, float]:
    """Cross-entropy and accuracy."""
    assert isinstance(part.inputs, Tensor)
    answers = torch.cat([network(inputs) for inputs in torch.split(part.inputs, CHUNK)])
    loss = nn.functional.cross_entropy(answers.double(), part.targets)
    return float(loss), float((answers.argmax(1) == part.targets).double().mean())


def gap(network: nn.Module, halves: Halves) -> dict[str, float]:
    """Loss and accuracy on both halves, and the generalisation gap."""
    (train_loss, train_accuracy), (test_loss, test_accuracy) = (evaluate(network, half) for half in halves)
    losses = {"train_loss": train_loss, "test_loss": test_loss, "gap": test_loss - train_loss}
    return {**losses, "train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
