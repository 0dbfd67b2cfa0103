"""Tasks: what is learned, by which network, with which optimiser and budget.

A task is a frozen record. A new one is one more entry in ``TASKS``; nothing else needs to know it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR

from relflat.lab.data import mnist1d
from relflat.lab.data.augment import Augment, crop_flip, crop_flip_cutout, cutout, shift
from relflat.lab.data.splits import Splits, classification
from relflat.lab.names import look_up
from relflat.lab.tasks import grokking, own, text
from relflat.lab.tasks.efficientnet import efficientnet_lite0
from relflat.lab.tasks.models import mlp, resnet18, resnet20, small_cnn, wide_resnet
from relflat.lab.train.evaluate import ACCURACY, Metric
from relflat.papers import skulls
from relflat.papers.skull_metrics import DICE
from relflat.papers.skull_models import Autoencoder, Completion, dice_cross_entropy, dice_loss


@dataclass(frozen=True)
class SGD:
    """Settings of stochastic gradient descent; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def __call__(self, params: Iterable[Any]) -> optim.Optimizer:
        """Build the optimiser."""
        return optim.SGD(
            params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class Adam:
    """Settings of Adam, weight decay as an L2 penalty; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.0

    def __call__(self, params: Iterable[Any]) -> optim.Optimizer:
        """Build the optimiser."""
        return optim.Adam(params, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class AdamW:
    """Settings of AdamW; called with parameters, it builds the optimiser."""

    lr: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)

    def __call__(self, params: Iterable[Any]) -> optim.Optimizer:
        """Build the optimiser."""
        return optim.AdamW(params, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)


def constant(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate as it is."""
    return LambdaLR(optimizer, lambda step: 1.0)


def staircase(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate times 0.2 after .3, .6 and .8 of all steps (Zagoruyko and Komodakis 2016; the FAM paper)."""
    return MultiStepLR(optimizer, [round(share * steps) for share in (0.3, 0.6, 0.8)], gamma=0.2)


def linear(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate rises over a tenth of the steps and falls linearly to zero, as is usual for fine-tuning."""
    rise = max(1, steps // 10)
    return LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))
    )


def cosine(optimizer: optim.Optimizer, steps: int) -> LRScheduler:
    """Learning rate falls to zero along half a cosine over all steps."""
    return CosineAnnealingLR(optimizer, T_max=steps)


class SplitFunction(Protocol):
    """Cuts the task's data into splits."""

    def __call__(self, *, train_size: int | None, label_noise: float, seed: int) -> Splits:
        """Return the splits of a run with this seed."""
        ...


@dataclass(frozen=True)
class Task:
    """Everything about a learning problem except the algorithm.

    Attributes:
        name: the name on the command line.
        summary: one line for lists.
        splits: makes the training, validation and test splits.
        model: builds the untrained network.
        loss: builds the criterion, mean over samples.
        layer: the layer whose kappa is followed during training, and the default one to regularise.
        optimizer: the base optimiser's settings.
        schedule: learning rate over the steps.
        epochs: passes over the training data.
        batch_size: samples a step.
        metric: what it is judged by.
        augment: changes the training pictures at random; None for none.
        evaluation_size: samples at a time when evaluating.
        monitored: samples of the training and validation splits that metrics and kappa of an epoch are taken on.
        version: raised when the same configuration gives other numbers than before (another network, augmentation,
            cut of the data, or something that a task's own file imports); runs of another version are not reused.
    """

    name: str
    summary: str
    splits: SplitFunction
    model: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    layer: str
    optimizer: SGD | Adam | AdamW
    schedule: Callable[[optim.Optimizer, int], LRScheduler]
    epochs: int
    batch_size: int
    metric: Metric = ACCURACY
    augment: Augment | None = None
    evaluation_size: int = 1000
    monitored: int = 1000
    version: int = 1


DIGITS = Task(
    name="digits",
    summary="8x8 digits shifted by up to a pixel, MLP 64-128-128-10; 897 train, 400 validation, 500 test",
    splits=partial(classification, "digits", validation=400, test=500),
    model=partial(mlp, 64),
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=SGD(lr=0.05, weight_decay=5e-4),
    schedule=cosine,
    epochs=80,
    batch_size=32,
    augment=partial(shift, pad=1),
)

FASHION_MNIST = Task(
    name="fashion-mnist",
    summary="28x28 clothes, small CNN; 55,000 train, 5,000 validation, the official 10,000 test",
    splits=partial(classification, "fashion-mnist", validation=5000, test=None),
    model=partial(small_cnn, in_channels=1),
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=SGD(lr=0.05, weight_decay=5e-4),
    schedule=cosine,
    epochs=25,
    batch_size=64,
)

CIFAR10 = replace(
    FASHION_MNIST,
    name="cifar10",
    summary="32x32 pictures, small CNN; 45,000 train, 5,000 validation, the official 10,000 test",
    splits=partial(classification, "cifar10", validation=5000, test=None),
    model=partial(small_cnn, in_channels=3),
)

CIFAR10_FINETUNE = replace(
    CIFAR10,
    name="cifar10-finetune",
    summary="32x32 pictures enlarged to 64x64, pretrained EfficientNet-Lite0",
    splits=partial(classification, "cifar10", validation=5000, test=None, standardise=False),
    model=efficientnet_lite0,
    optimizer=AdamW(lr=1e-3),
    schedule=linear,
    epochs=2,
    augment=crop_flip,
    evaluation_size=500,
)

CIFAR100 = replace(
    CIFAR10,
    name="cifar100",
    summary="32x32 pictures of 100 classes, shifted and mirrored, ResNet-20; from the Hugging Face hub",
    splits=partial(classification, "cifar100", validation=5000, test=None),
    model=partial(resnet20, num_classes=100),
    optimizer=SGD(lr=0.1, weight_decay=5e-4),
    epochs=30,
    batch_size=128,
    augment=crop_flip,
)

SVHN = replace(
    CIFAR10,
    name="svhn",
    summary="32x32 house numbers, shifted, ResNet-20; 68,257 train, 5,000 validation, the official 26,032 test; "
    "from the Hugging Face hub",
    splits=partial(classification, "svhn", validation=5000, test=None),
    model=resnet20,
    optimizer=SGD(lr=0.1, weight_decay=5e-4),
    epochs=15,
    batch_size=128,
    augment=shift,
)

REVIEWS = Task(
    name="reviews",
    summary="sentences of film reviews, good or bad, pretrained MiniLM; 7,070 train, 1,000 validation, 2,000 test; "
    "Amazon, news and tweets as further test sets",
    splits=partial(classification, text.read_reviews, validation=1000, test=2000, standardise=False),
    model=text.minilm,
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=AdamW(lr=5e-5),
    schedule=linear,
    epochs=2,
    batch_size=32,
    evaluation_size=200,
)


def glue(name: str, validation: int) -> SplitFunction:
    """Splits of a GLUE task; the official validation set is the test set."""
    return partial(
        classification, partial(text.read_glue, name), validation=validation, test=None, standardise=False
    )


RTE = replace(
    REVIEWS,
    name="rte",
    summary="does a sentence follow from another, pretrained MiniLM; 2,240 train, 250 validation, GLUE's 277 test; "
    "from the Hugging Face hub",
    splits=glue("rte", 250),
    epochs=20,
)

SKULLS = Task(
    name="skulls",
    summary="deformations of one real CT, 48^3 voxels, a hole in each vault; autoencoder with latent 8; 100 train, "
    "40 validation, 50 test and the same 50 with larger holes",
    splits=skulls.splits,
    model=Autoencoder,
    loss=dice_loss,
    layer="from_latent",
    optimizer=Adam(lr=3e-3),
    schedule=cosine,
    epochs=64,
    batch_size=5,
    metric=DICE,
    evaluation_size=10,
    monitored=5,
)

ADDITION = Task(
    name="addition",
    summary="(a + b) mod 97, MLP that generalises long after it knows its 3,764 training sums by heart",
    splits=grokking.splits,
    model=grokking.AdditionMLP,
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=AdamW(lr=3e-3, weight_decay=1.0),
    schedule=constant,
    epochs=400,
    batch_size=512,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        DIGITS,
        FASHION_MNIST,
        replace(
            FASHION_MNIST,
            name="fashion-mnist-resnet18",
            summary="28x28 clothes, ResNet-18 + Linear-64",
            model=partial(resnet18, in_channels=1, feature_width=64),
        ),
        replace(
            FASHION_MNIST,
            name="fashion-mnist-wrn",
            summary="28x28 clothes with cutout, WRN-28-10 + Linear-64 and the FAM paper's schedule; for a GPU",
            model=partial(wide_resnet, in_channels=1),
            optimizer=SGD(lr=0.01, weight_decay=5e-4, nesterov=True),
            schedule=staircase,
            epochs=200,
            augment=cutout,
        ),
        CIFAR10,
        replace(
            CIFAR10,
            name="cifar10-resnet20",
            summary="32x32 pictures, shifted and mirrored, ResNet-20",
            model=resnet20,
            optimizer=SGD(lr=0.1, weight_decay=5e-4),
            epochs=15,
            batch_size=128,
            augment=crop_flip,
        ),
        replace(
            CIFAR10,
            name="cifar10-resnet18",
            summary="32x32 pictures, shifted and mirrored, ResNet-18 + Linear-64, the FAM paper's budget; for a GPU",
            model=partial(resnet18, feature_width=64),
            optimizer=SGD(lr=0.03, weight_decay=5e-4),
            epochs=250,
            augment=crop_flip,
        ),
        replace(
            CIFAR10,
            name="cifar10-wrn",
            summary="32x32 pictures, shifted and mirrored, WRN-28-10 + Linear-64; for a GPU",
            model=wide_resnet,
            optimizer=SGD(lr=0.1, weight_decay=5e-4, nesterov=True),
            schedule=staircase,
            epochs=200,
            batch_size=128,
            augment=crop_flip,
        ),
        CIFAR10_FINETUNE,
        CIFAR100,
        replace(
            CIFAR10_FINETUNE,
            name="cifar100-finetune",
            summary="32x32 pictures of 100 classes enlarged to 64x64, pretrained EfficientNet-Lite0; from the hub",
            splits=partial(classification, "cifar100", validation=5000, test=None, standardise=False),
            model=partial(efficientnet_lite0, num_classes=100),
            epochs=5,
        ),
        SVHN,
        replace(
            SVHN,
            name="svhn-wrn",
            summary="32x32 house numbers, WRN-28-10 + Linear-64, the FAM paper's schedule; from the hub, for a GPU",
            model=wide_resnet,
            optimizer=SGD(lr=0.1, weight_decay=5e-4, nesterov=True),
            schedule=staircase,
            epochs=100,
            augment=crop_flip_cutout,
        ),
        Task(
            name="mnist1d",
            summary="synthetic signals of length 40, three convolutions; 3,500 train, 500 validation, 1,000 test",
            splits=partial(classification, mnist1d.read, validation=500, test=None),
            model=mnist1d.signal_cnn,
            loss=nn.CrossEntropyLoss,
            layer="output",
            optimizer=AdamW(lr=3e-3),
            schedule=cosine,
            epochs=40,
            batch_size=64,
        ),
        SKULLS,
        replace(
            SKULLS,
            name="skulls-unet",
            summary="deformations of one real CT, 48^3 voxels, a hole in each vault; U-Net that only adds",
            model=Completion,
            loss=dice_cross_entropy,
            layer="output",
            optimizer=Adam(lr=2e-3),
            epochs=32,
            batch_size=2,
        ),
        ADDITION,
        replace(
            ADDITION,
            name="addition-transformer",
            summary="(a + b) mod 59, transformer of one block; 1,740 sums to train on",
            splits=partial(grokking.splits, modulus=59, fraction=0.5),
            model=partial(grokking.AdditionTransformer, 59, width=64),
            epochs=300,
            batch_size=580,
        ),
        REVIEWS,
        RTE,
        replace(
            RTE,
            name="mrpc",
            summary="do two sentences say the same, pretrained MiniLM; 3,268 train, 400 validation, GLUE's 408 test; "
            "from the hub",
            splits=glue("mrpc", 400),
            epochs=5,
        ),
        replace(
            RTE,
            name="sst2",
            summary="phrases of film reviews, pretrained MiniLM; 64,349 train, 3,000 validation, GLUE's 872 test; "
            "from the hub",
            splits=glue("sst2", 3000),
            epochs=2,
        ),
    )
}


def task_named(name: str) -> Task:
    """The task of this name, or the one that ``path/to/file.py:name`` defines.

    Raises:
        ConfigError: there is none.
    """
    own.require_name(name, Task)
    place = own.split_name(name)
    task: Task = look_up("task", name, TASKS) if place is None else own.load(*place, Task)
    return task


def full_name(name: str) -> str:
    """The name of a task with the whole path of its file, if it has one."""
    place = own.split_name(name)
    return name if place is None else f"{place[0]}:{place[1]}"


def short_name(name: str) -> str:
    """The name of a task for folders."""
    place = own.split_name(name)
    return name if place is None else f"{place[0].stem}-{place[1]}"


def title_of(name: str) -> str:
    """The name of a task for people: what a task of the user's calls itself, unless a built-in one is called so."""
    given = task_named(name).name
    return short_name(name) if given in TASKS else given


def source_of(name: str) -> str | None:
    """What stands for the task's code: the content of its file, and its version from 2 on; None for neither."""
    place, version = own.split_name(name), task_named(name).version
    parts = [] if place is None else [own.fingerprint(place[0])]
    parts += [] if version == 1 else [f"version {version}"]
    return " ".join(parts) or None


def changed_since(name: str, recorded: str | None) -> str | None:
    """The beginning of a sentence about a task whose code is no longer what it was, or None.

    Args:
        name: of the task.
        recorded: what `source_of` gave then.
    """
    now, place = source_of(name), own.split_name(name)
    if now == recorded:
        return None
    before, after = ((source or "").partition("version ") for source in (recorded, now))
    if before[0].strip() != after[0].strip():
        return f"The task file {name if place is None else place[0]} has changed since"
    return f"The task {short_name(name)!r} has changed (version {before[2] or 1}, now {after[2] or 1}) since"
