"""The rows of the tables: ways to train a network. A new one is one more line in ``OUTPUT`` or ``HIDDEN``."""

from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn, optim

from networks import NETWORKS, Batch
from relflat import FAM

SGD = {"lr": 1e-3, "momentum": 0.9}


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        label: its name in tables.
        layer: the layer, glob or list that FAM regularises; None for no FAM.
        options: further arguments of FAM.
        sam: whether pytorch_optimizer's SAM does the steps.
    """

    label: str
    layer: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    sam: bool = False

    @property
    def varies(self) -> bool:
        """Whether its steps differ in cost, so that only their mean says what it costs."""
        return "layers_per_step" in self.options


def fam(layer: Any, note: str = "", **options: Any) -> Row:
    """A row of FAM, labelled by its layer and options."""
    words = [f"{k}={v}" for k, v in options.items() if k != "strength"]
    return Row(" ".join(["FAM", note or str(layer), *words]), layer, {"strength": 0.1} | options)


PLAIN = Row("plain")
CONTROL = Row("plain again")  # the same thing twice: shows the error of the timing itself
SAM_ROW = Row("SAM (pytorch_optimizer)", sam=True)

OUTPUT = (
    PLAIN,
    CONTROL,
    fam("output"),
    fam("output", gradient="frozen"),
    fam("output", gradient="weights"),
    fam("output", radius=0.1),
    fam("output", radius=0.1, strength=1.0, note="output strength=1"),
    SAM_ROW,
)

HIDDEN: dict[str, tuple[Row, ...]] = {
    "resnet18": (
        PLAIN,
        CONTROL,
        fam("blocks.7.conv2", "last block's convolution"),
        fam("blocks.7.conv2", "last block's convolution", gradient="frozen"),
        fam("*", "all convolutions + output"),
        fam("*", "all convolutions + output", gradient="frozen"),
        SAM_ROW,
    ),
    "mlp": (
        PLAIN,
        CONTROL,
        fam("fc3"),
        fam("fc3", gradient="frozen"),
        fam("fc2"),
        fam("fc2", gradient="frozen"),
        fam("fc2", curvature="hessian"),
        fam("fc2", radius=0.1),
        fam("fc2", radius=0.1, strength=1.0, note="fc2 strength=1"),
        fam("fc*"),
        SAM_ROW,
    ),
    "transformer": (
        PLAIN,
        CONTROL,
        fam("encoder.layers.5.linear2", "last linear2"),
        fam("encoder.layers.5.linear2", "last linear2", gradient="frozen"),
        fam("encoder.layers.5.linear1", "last linear1"),
        fam("encoder.layers.5.linear1", "last linear1", radius=0.1),
        fam("encoder.layers.*.linear?", "all MLP layers"),
        fam("encoder.layers.*.linear?", "all MLP layers", gradient="frozen"),
        SAM_ROW,
    ),
}

ALL_LAYERS = {
    "resnet18": ("*", "all convolutions + output"),
    "transformer": ("encoder.layers.*.linear?", "all MLP layers"),
}
LAYERS: dict[str, tuple[Row, ...]] = {
    network: (
        PLAIN,
        CONTROL,
        fam(layer, note),
        fam(layer, note, layers_per_step=1),
        fam(layer, note, gradient="frozen"),
    )
    for network, (layer, note) in ALL_LAYERS.items()
}


def custom(layers: list[str]) -> tuple[Row, ...]:
    """Rows for layers named on the command line."""
    rows = [fam(layer, gradient=gradient) for layer in layers for gradient in ("full", "frozen")]
    return (PLAIN, CONTROL, *rows, SAM_ROW)


class Trainer:
    """A network, optimiser and criterion of one row, and one batch to repeat steps on.

    Args:
        row: how to train.
        network: a name in ``NETWORKS``.
        samples: the batch size.

    Trainers of the same network and batch size begin with the same weights and data.
    """

    def __init__(self, row: Row, network: str, samples: int) -> None:
        build, draw = NETWORKS[network]
        torch.manual_seed(0)
        self.model: nn.Module = build().train()
        self.batch: Batch = draw(samples)
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if row.layer is not None:
            self.criterion = FAM(self.criterion, self.model, row.layer, seed=0, **row.options)
        self._sam = row.sam
        parameters = self.model.parameters()
        self.optimizer = SAM(parameters, optim.SGD, **SGD) if row.sam else optim.SGD(parameters, **SGD)

    def warm_up(self) -> None:
        """What happens once: the optimiser's state, the output layer found, coupling settled."""
        self.step()

    def step(self) -> None:
        """One update of all weights."""
        loss = self._backward()
        if self._sam:
            self.optimizer.step(self._backward)
        else:
            self.optimizer.step()
        if not torch.isfinite(loss):
            raise RuntimeError("the loss diverged, so what was timed is not training")

    def _backward(self) -> Tensor:
        inputs, targets = self.batch
        self.optimizer.zero_grad()
        loss: Tensor = self.criterion(self.model(inputs), targets)
        loss.backward()
        return loss.detach()

    def report(self) -> dict[str, Any]:
        """What FAM says of the last step; empty without FAM."""
        return self.criterion.last if isinstance(self.criterion, FAM) else {}
