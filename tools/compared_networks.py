"""The networks that ``same_values.py`` measures: each with layers, data and a loss, built the same way anywhere.

Only torch and transformers are used, so that two versions of the library see the same networks. The default type
of numbers is to be float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

N, IN, CLASSES = 6, 4, 3
CE = nn.CrossEntropyLoss()
LABELS = [0, 2, 1, 1, 0, 2]


class Net(nn.Module):
    """Parts and a forward pass that is a function of them."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        """Run the function."""
        return self.run(self, *args)


class Positive(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        """Make the weight positive."""
        return F.softplus(w)


class LoRA(nn.Module):
    """A dense layer with adapters, as ``peft`` wraps it."""

    def __init__(self, base: nn.Linear, ranks: dict[str, int]) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        m, d = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({k: nn.Linear(m, r, bias=False) for k, r in ranks.items()})
        self.lora_B = nn.ModuleDict({k: nn.Linear(r, d, bias=False) for k, r in ranks.items()})
        self.scaling = {k: 2.0 / r for k, r in ranks.items()}
        self.active_adapters = list(ranks)
        self.disable_adapters = self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Add what the adapters say to the base layer."""
        z = self.base_layer(x)
        for k in self.active_adapters:
            z = z + self.lora_B[k](self.lora_A[k](x)) * self.scaling[k]
        return z


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: unique.
        build: makes it.
        layers: what is measured, one at a time.
        x: makes the inputs.
        y: makes the targets.
        loss: the criterion.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    x: Callable[[], Any] = lambda: torch.randn(N, IN)
    y: Callable[[], Tensor] = lambda: torch.tensor(LABELS)
    loss: Any = CE


def values(*shape: int) -> Callable[[], Tensor]:
    """Makes normal numbers."""
    return lambda: torch.randn(*shape)


def tokens(length: int, vocabulary: int) -> Callable[[], Tensor]:
    """Makes sentences of token numbers."""
    return lambda: torch.randint(vocabulary, (N, length))


def mlp(*widths: int, between: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Dense layers with something between them."""
    parts: list[nn.Module] = []
    for m, d in pairwise(widths):
        parts += [nn.Linear(m, d), between()]
    return nn.Sequential(*parts[:-1])


# -- losses, on one small network --------------------------------------------------------------------------


def _focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.log_softmax(1).gather(1, y[:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def _ignoring() -> Tensor:
    return torch.tensor([0, -100, 1, 1, -100, 2])


def _probabilities() -> Tensor:
    return torch.randn(N, CLASSES).softmax(1)


def _some_weights() -> Tensor:
    return torch.linspace(0.5, 2.0, CLASSES)


def losses() -> list[Network]:
    """A two-layer network with each kind of loss, reduction and target."""
    reals, ones = values(N, CLASSES), _probabilities
    table: dict[str, tuple[Any, Callable[[], Tensor] | None]] = {
        "cross-entropy": (CE, None),
        "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), None),
        "cross-entropy, none": (nn.CrossEntropyLoss(reduction="none"), None),
        "cross-entropy, smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), None),
        "cross-entropy, weights": (nn.CrossEntropyLoss(weight=_some_weights()), None),
        "cross-entropy, weights and smoothing": (
            nn.CrossEntropyLoss(weight=_some_weights(), label_smoothing=0.1),
            None,
        ),
        "cross-entropy, ignoring": (nn.CrossEntropyLoss(), _ignoring),
        "cross-entropy, ignoring, sum": (nn.CrossEntropyLoss(reduction="sum"), _ignoring),
        "cross-entropy, soft": (nn.CrossEntropyLoss(), ones),
        "cross-entropy, soft, weights": (nn.CrossEntropyLoss(weight=_some_weights()), ones),
        "binary": (nn.BCEWithLogitsLoss(), ones),
        "binary, weights, sum": (
            nn.BCEWithLogitsLoss(reduction="sum", weight=_some_weights(), pos_weight=_some_weights()),
            ones,
        ),
        "squares": (nn.MSELoss(), reals),
        "squares, sum": (nn.MSELoss(reduction="sum"), reals),
        "F.cross_entropy": (F.cross_entropy, None),
        "F.mse_loss": (F.mse_loss, reals),
        "log-softmax and nll": (lambda z, y: F.nll_loss(z.log_softmax(1), y), None),
        "a cross-entropy of one's own": (lambda z, y: (z.logsumexp(1) - z[torch.arange(len(y)), y]).mean(), None),
        "scaled, with a constant": (lambda z, y: 3 * F.cross_entropy(z, y) + 1, None),
        "focal": (_focal, None),
        "huber": (nn.HuberLoss(delta=0.8), reals),
        "poisson": (nn.PoissonNLLLoss(), lambda: torch.floor(3 * torch.rand(N, CLASSES))),
    }
    default = Network.y
    return [
        Network(f"loss {name}", lambda: mlp(IN, 5, CLASSES), ("0", "2"), y=y or default, loss=loss)
        for name, (loss, y) in table.items()
    ]


# -- classes of layers and shapes of networks ----------------------------------------------------------------


def _then_linear(layer: nn.Module, features: int, norm: nn.Module | None = None) -> nn.Module:
    """A layer, perhaps a normalisation, tanh, and a dense output layer."""
    norm = nn.Identity() if norm is None else norm
    return Net(
        lambda m, x: m.head(m.norm(m.layer(x)).tanh().flatten(1)),
        layer=layer,
        norm=norm,
        head=nn.Linear(features, CLASSES),
    )


def dense() -> list[Network]:
    """Dense layers: depths, activations, normalisations, parametrizations, GPT-2's and LoRA's."""
    both = ("layer", "head")

    def one(name: str, layer: Callable[[], nn.Module], norm: Callable[[], nn.Module] = nn.Identity) -> Network:
        return Network(name, lambda: _then_linear(layer(), 3, norm()), both)

    def positive() -> nn.Module:
        layer = nn.Linear(IN, 3)
        parametrize.register_parametrization(layer, "weight", Positive())
        return layer

    return [
        Network("linear", lambda: mlp(IN, CLASSES), ("0",)),
        Network("mlp of three layers", lambda: mlp(IN, 5, 4, CLASSES), ("0", "2", "4")),
        Network("mlp with relu", lambda: mlp(IN, 5, 4, CLASSES, between=nn.ReLU), ("0", "4")),
        Network("mlp with gelu on tokens", lambda: _on_tokens(nn.GELU), ("0.0", "0.2"), x=values(N, 3, IN)),
        one("batch norm", lambda: nn.Linear(IN, 3), lambda: nn.BatchNorm1d(3)),
        one("layer norm", lambda: nn.Linear(IN, 3), lambda: nn.LayerNorm(3)),
        one("rms norm", lambda: nn.Linear(IN, 3), lambda: nn.RMSNorm(3)),
        one("weight norm", lambda: parametrizations.weight_norm(nn.Linear(IN, 3))),
        one("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(IN, 3))),
        one("own parametrization", positive),
        one("lora", lambda: LoRA(nn.Linear(IN, 3), {"a": 1, "b": 2})),
        one("gpt-2's Conv1D", lambda: Conv1D(3, IN)),
        Network("checkpointed", lambda: _then_linear(_checkpointed(mlp(IN, 5, 3)), 3), ("layer.part.0", "head")),
    ]


def _on_tokens(between: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(mlp(IN, 5, CLASSES, between=between), Net(lambda m, z: z.mean(1)))


def _checkpointed(part: nn.Module) -> nn.Module:
    return Net(lambda m, x: checkpoint(m.part, x, use_reentrant=False), part=part)


def convolutions() -> list[Network]:
    """Convolutions of one to three dimensions: grouped, strided, dilated, transposed, padded, normalised."""
    both = ("layer", "head")

    def one(
        name: str,
        layer: Callable[[], nn.Module],
        features: int,
        *shape: int,
        norm: Callable[[], nn.Module] = nn.Identity,
    ) -> Network:
        return Network(name, lambda: _then_linear(layer(), features, norm()), both, x=values(N, *shape))

    return [
        one("conv1d", lambda: nn.Conv1d(2, 3, 2), 9, 2, 4),
        one("conv2d", lambda: nn.Conv2d(2, 3, 2), 12, 2, 3, 3),
        one("conv2d strided, dilated", lambda: nn.Conv2d(1, 2, 2, stride=2, dilation=2), 8, 1, 5, 5),
        one("conv2d grouped", lambda: nn.Conv2d(4, 4, 2, groups=2), 16, 4, 3, 3),
        one("conv2d depthwise", lambda: nn.Conv2d(2, 4, 2, groups=2, padding=(1, 0)), 24, 2, 2, 3),
        one("conv2d circular", lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), 18, 1, 3, 3),
        one("conv3d", lambda: nn.Conv3d(1, 2, 2), 4, 1, 2, 2, 3),
        one("conv1d transposed", lambda: nn.ConvTranspose1d(2, 2, 3, stride=2), 14, 2, 3),
        one("conv2d transposed, grouped", lambda: nn.ConvTranspose2d(2, 4, 2, 1, 1, groups=2), 16, 2, 3, 3),
        one("conv and group norm", lambda: nn.Conv1d(2, 4, 2), 8, 2, 3, norm=lambda: nn.GroupNorm(2, 4)),
        one("conv and instance norm", lambda: nn.Conv1d(1, 2, 2), 6, 1, 4, norm=lambda: nn.InstanceNorm1d(2)),
        Network("conv and batch norm", _conv_and_batch_norm, both, x=values(N, 1, 3, 3)),
        Network("small resnet", _resnet, ("one", "two", "down", "head"), x=values(N, 2, 4, 4)),
        Network(
            "segmentation",
            lambda: nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, CLASSES, 1)),
            ("0", "2"),
            x=values(N, 1, 4),
            y=lambda: torch.randint(CLASSES, (N, 4)),
        ),
    ]


def _conv_and_batch_norm() -> nn.Module:
    return _then_linear(nn.Conv2d(1, 2, 3, padding=1, bias=False), 18, nn.BatchNorm2d(2))


def _resnet() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.norm1(m.one(x)).relu()
        return m.head((m.norm2(m.two(h)) + m.down(x)).relu().mean((2, 3)))

    return Net(
        run,
        one=nn.Conv2d(2, 3, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(3),
        two=nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        norm2=nn.BatchNorm2d(4),
        down=nn.Conv2d(2, 4, 1, stride=2),
        head=nn.Linear(4, CLASSES),
    )
