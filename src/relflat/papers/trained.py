"""Networks trained until their training loss is below a level: what the correlation studies compare.

Networks that end at the same training loss differ in how far they generalise, and not merely in how long they were
trained. Each network has a file of results and one of weights, so an interrupted study goes on where it stopped.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from relflat.errors import DataError
from relflat.lab.compare.trials import workers
from relflat.lab.data.arrays import Arrays
from relflat.lab.data.splits import classification
from relflat.lab.names import look_up
from relflat.lab.tasks.models import mlp
from relflat.lab.train import store
from relflat.papers.association import tau
from relflat.papers.experiment import Context

A = TypeVar("A")
B = TypeVar("B")
Say = Callable[[str], None]
CHUNK = 2000  # samples at a time when evaluating


def lenet5() -> nn.Sequential:
    """LeNet-5 for 32x32 pictures of three channels, with ReLU and max-pooling; the output weight is (10, 84)."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(3, 6, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            output=nn.Linear(84, 10),
        )
    )


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
    """Which samples.

    Attributes:
        data: name of the data set.
        train_size: how many training samples; None for all.
        test_size: how many of the test samples, from the first on; None for all.
        held_out: samples to cut a test set from, where the data set has no official one; None where it has.
    """

    data: str
    train_size: int | None = None
    test_size: int | None = None
    held_out: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How one network is trained, by SGD with momentum 0.9 at a constant learning rate.

    Attributes:
        source: its samples.
        network: its name in ``NETWORKS``.
        batch_size: samples a step.
        lr: learning rate.
        weight_decay: of all parameters.
        seed: of the initial weights and the order of the samples.
        level: training stops after the first epoch whose training loss is below this.
        most_epochs: and after so many epochs in any case.
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
        return (
            f"batch {self.batch_size}, lr {self.lr:g}, weight decay {self.weight_decay:g}, seed {self.seed}"
        )

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
    most_epochs: int,
) -> list[Recipe]:
    """Every combination of the values."""
    return [
        Recipe(source, network, size, lr, decay, seed, most_epochs=most_epochs)
        for size, lr, decay, seed in product(batch_sizes, lrs, weight_decays, seeds)
    ]


@lru_cache(maxsize=1)
def samples(source: Source) -> Halves:
    """Read the samples; training ones standardised by themselves, test ones the same way."""
    splits = classification(
        source.data,
        validation=0,
        test=source.held_out,
        train_size=source.train_size,
        label_noise=0.0,
        seed=0,
    )
    part = splits.test().take(slice(source.test_size))
    assert isinstance(part.inputs, Tensor)
    return Halves(splits.train, Arrays(part.inputs.clone(), part.targets.clone()))  # lets go of the rest


class Trained(NamedTuple):
    """A network and how it got there.

    Attributes:
        recipe: how it was trained.
        network: in evaluation mode, with the weights it ended with.
        result: ``reached`` (the level), ``epochs``, ``train_loss``, ``test_loss``, ``train_accuracy``,
            ``test_accuracy`` and ``gap``, which is test loss minus train loss.
    """

    recipe: Recipe
    network: nn.Sequential
    result: dict[str, Any]


def trained(recipe: Recipe, folder: Path) -> Trained:
    """Train the network, or read it if that was done.

    Args:
        recipe: how.
        folder: where results and weights are kept.
    """
    result_file, weights = folder / f"{recipe.digest}.json", folder / f"{recipe.digest}.safetensors"
    network = look_up("network", recipe.network, NETWORKS)
    if not result_file.is_file():
        halves = samples(recipe.source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            fresh = he_initialised(network())
            epochs, loss = fit(fresh, recipe, halves.train)
        save_model(fresh, str(weights))
        store.write_json(
            result_file, {"recipe": asdict(recipe), **describe(fresh, halves, epochs, loss < recipe.level)}
        )
    with torch.random.fork_rng(devices=[]):
        found = network()
    load_model(found, str(weights))
    return Trained(recipe, found.eval(), store.read_json(result_file))


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
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
    )
    size, loss, epoch = min(recipe.batch_size, len(train)), float("inf"), 0
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
def logits(network: nn.Module, part: Arrays) -> Float[Tensor, "n d"]:
    """The network's answers."""
    assert isinstance(part.inputs, Tensor)
    return torch.cat([network(inputs) for inputs in torch.split(part.inputs, CHUNK)])


def evaluate(network: nn.Module, part: Arrays) -> tuple[float, float]:
    """Cross-entropy and accuracy."""
    answers = logits(network, part)
    loss = nn.functional.cross_entropy(answers.double(), part.targets)
    return float(loss), float((answers.argmax(1) == part.targets).double().mean())


def describe(network: nn.Module, halves: Halves, epochs: int, reached: bool) -> dict[str, Any]:
    """The result of a trained network; see ``Trained``."""
    (train_loss, train_accuracy), (test_loss, test_accuracy) = (evaluate(network, half) for half in halves)
    return {
        "reached": reached,
        "epochs": epochs,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "gap": test_loss - train_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
    }


# -- many of them ------------------------------------------------------------------------------------------------


def each(
    pool: Executor, work: Callable[[A], B], items: Iterable[A], on_done: Callable[[int, int], None]
) -> list[B]:
    """Do the work for every item and return the results in order; the first error stops the rest.

    Args:
        pool: does it.
        work: a function that can be sent to another process.
        items: what to do it for.
        on_done: called with how many are done and how many there are.
    """
    futures = []
    for item in items:
        futures.append(pool.submit(work, item))
    try:
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            on_done(done, len(futures))
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]


def study(
    context: Context, name: str, work: Callable[[Path, Recipe], A], networks: Sequence[Recipe]
) -> list[A]:
    """Study every network, in the order given; what an earlier command kept is not done again.

    Args:
        context: folders, workers, who is told.
        name: of the folder in the folder of runs.
        work: done for each network; given that folder and the network.
        networks: to train.
    """
    folder = context.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    with workers(context.workers) as pool:
        return each(
            pool,
            partial(work, folder),
            networks,
            lambda done, total: context.on_progress(f"{done} of {total} networks"),
        )


def those_that_reached(networks: Sequence[Recipe], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of the networks that reached the level.

    Raises:
        DataError: fewer than three did.
    """
    done = [record for record in records if record["reached"]]
    if len(done) < 3:
        raise DataError(
            f"{len(done)} of {len(records)} networks reached a training loss of {networks[0].level:g}, too few to "
            "correlate anything. Raise most_epochs or lower the learning rates."
        )
    return done


def kept(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON object in a file: read if it is there, else made and written."""
    if not path.is_file():
        store.write_json(path, make())
    return store.read_json(path)


def by_setting(records: Sequence[Mapping[str, Any]], kappas: Sequence[float]) -> str:
    """A sentence on how the settings of the networks go with their gaps and kappas by themselves.

    Args:
        records: the results of networks that reached the level.
        kappas: of the same networks.
    """
    gaps = np.array([record["gap"] for record in records])
    once = np.ones((1, len(records)))

    settings = {
        title: np.array([float(record["recipe"][key]) for record in records])
        for key, title in (
            ("batch_size", "batch size"),
            ("lr", "learning rate"),
            ("weight_decay", "weight decay"),
        )
    }

    def taus(values: NDArray[np.float64]) -> str:
        return ", ".join(
            f"{title} {tau(setting, values, once)[0]:+.2f}"
            for title, setting in settings.items()
            if setting.min() < setting.max()
        )

    return (
        f"The settings go with the gap by themselves (tau: {taus(gaps)}) and with kappa ({taus(np.array(kappas))}): "
        "what kappa and the gap have to do with each other is in part what the settings do to both."
    )


def named(recipes: Sequence[Recipe], results: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the networks that did not reach the level, by name; empty if all did."""
    lost = [
        f"{recipe.title} ({result['train_loss']:.2f} after {result['epochs']} epochs)"
        if result["train_loss"] is not None
        else f"{recipe.title} (diverged)"
        for recipe, result in zip(recipes, results, strict=True)
        if not result["reached"]
    ]
    if not lost:
        return ""
    return (
        f"{len(lost)} of {len(recipes)} networks did not reach a training loss of {recipes[0].level:g} and are left "
        f"out: {'; '.join(lost)}."
    )
