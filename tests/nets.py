"""Random small networks with data and a loss, as hypothesis strategies; an example rebuilds from its repr."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from relflat import reference

KNOWN_LOSSES = ("cross_entropy", "cross_entropy_probabilities", "bce", "mse", "F.cross_entropy", "F.bce", "F.mse")
UNKNOWN_LOSSES = ("huber", "smooth_l1", "poisson", "nll of log_softmax", "focal")
CLASS_INDEX_LOSSES = ("cross_entropy", "F.cross_entropy", "nll of log_softmax", "focal")
OVER_CLASSES = (*CLASS_INDEX_LOSSES, "cross_entropy_probabilities")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "softplus": nn.Softplus}


class Transpose(nn.Module):
    """(N, T, C) -> (N, C, T), as cross-entropy wants its classes."""

    def forward(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2)


class MeanOverPositions(nn.Module):
    """(N, T, m) -> (N, m): couples the positions of a sample."""

    def forward(self, phi: Tensor) -> Tensor:
        return phi.mean(1)


@dataclass(frozen=True)
class Loss:
    """Which loss, with which options; options the loss does not have are without effect."""

    kind: str
    reduction: str = "mean"
    weighted: bool = False
    pos_weighted: bool = False
    ignore_index: int | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Net:
    """A recipe, ``widths`` from the inputs to the outputs.

    With ``positions`` > 0 the inputs are (N, T, m), and each layer acts on every position; with ``pool`` they are
    averaged before the last layer. ``flatten`` turns (N, T, C) outputs into (N T, C), else they become (N, C, T).
    """

    seed: int
    widths: tuple[int, ...]
    activation: str
    loss: Loss
    batch: int
    positions: int
    flatten: bool
    layer_index: int
    pool: bool = False

    @property
    def pooled(self) -> bool:
        return self.pool and self.positions > 0 and len(self.widths) > 2

    @property
    def is_output(self) -> bool:
        return self.layer_index == len(self.widths) - 2

    def build(self) -> "Problem":
        generator = torch.Generator().manual_seed(self.seed)
        leading = (self.batch, self.positions) if self.positions else (self.batch,)
        d = self.widths[-1]
        inputs = torch.randn(*leading, self.widths[0], generator=generator, dtype=torch.float64)
        if self.pooled:
            leading = leading[:1]
        loss_fn, targets = _loss_and_targets(self.loss, leading, d, generator)
        model = self._model(generator)
        if len(leading) > 1 and self.loss.kind in OVER_CLASSES:
            if self.flatten:
                model.append(nn.Flatten(0, 1))
                targets = targets.flatten(0, 1)
            else:
                model.append(Transpose())
                targets = targets.transpose(1, 2) if targets.is_floating_point() else targets
        return Problem(self, model, loss_fn, inputs, targets)

    def _model(self, generator: torch.Generator) -> nn.Sequential:
        modules: list[nn.Module] = []
        for m, d in zip(self.widths, self.widths[1:], strict=False):
            linear = nn.Linear(m, d, dtype=torch.float64)
            for p in linear.parameters():
                p.data = 0.8 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            modules += [linear, ACTIVATIONS[self.activation]()]
        if self.pooled:
            modules[-3] = nn.Sequential(modules[-3], MeanOverPositions())
        return nn.Sequential(*modules[:-1])


@dataclass(frozen=True)
class Problem:
    """A built net: everything a measurement or a training step needs."""

    net: Net
    model: nn.Sequential
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def layer(self) -> str:
        return str(2 * self.net.layer_index)

    @property
    def linear(self) -> nn.Linear:
        return self.model[2 * self.net.layer_index]

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    @property
    def loss_has_a_closed_form(self) -> bool:
        return self.net.is_output and self.net.loss.kind in KNOWN_LOSSES

    def task_loss(self) -> Tensor:
        return self.loss_fn(self.model(self.inputs), self.targets)

    def at_layer(self) -> tuple[reference.LossOfWeight, Tensor]:
        return reference.at_layer(self.model, self.loss_fn, *self.data, self.layer)

    def kappa_adaptive(self, curvature: str = "hessian") -> Tensor:
        loss, W = self.at_layer()
        if curvature == "hessian":
            return reference.kappa_adaptive(loss, W)
        outputs, _ = reference.outputs_at_layer(self.model, self.inputs, self.layer)
        G = reference.layer_ggn(
            lambda r: outputs(W * (1 + r)), lambda z: self.loss_fn(z, self.targets), W.new_zeros(1, W.shape[1])
        )
        return torch.trace(G[0, :, 0, :])

    def kappa_normalized(self, curvature: str = "hessian") -> Tensor:
        std = self.features().flatten(0, -2).std(0, correction=0)
        loss, W = self.at_layer()
        if curvature == "hessian":
            return reference.kappa_normalized(loss, W, std)
        outputs, _ = reference.outputs_at_layer(self.model, self.inputs, self.layer)
        (varying,) = (std > 0).nonzero(as_tuple=True)
        if not len(varying):
            return (0 * W).sum()
        return reference.kappa_ggn(
            lambda V: outputs(W.index_copy(1, varying, V / std[varying])),
            lambda z: self.loss_fn(z, self.targets),
            W[:, varying] * std[varying],
        )

    def kappa(self, curvature: str = "hessian") -> Tensor:
        if curvature == "hessian":
            return reference.kappa(*self.at_layer())
        return reference.kappa_of_hessian(self.linear.weight, self.layer_ggn())

    def layer_ggn(self) -> Tensor:
        outputs, W = reference.outputs_at_layer(self.model, self.inputs, self.layer)
        return reference.layer_ggn(outputs, lambda z: self.loss_fn(z, self.targets), W)

    def features(self) -> Tensor:
        return self.model[: 2 * self.net.layer_index](self.inputs)

    def kappa_frozen(self, curvature: str = "hessian") -> Tensor:
        """kappa with the curvature behind the layer held constant; the gradient goes through W and phi."""
        phi = self.features()
        z = self.linear(phi).detach()
        tail = self.model[2 * self.net.layer_index + 1 :]

        def loss_of_outputs(outputs: Tensor) -> Tensor:
            return self.loss_fn(outputs, self.targets)

        if curvature == "hessian":
            H = torch.func.hessian(lambda z: loss_of_outputs(tail(z)))(z)
        else:
            J = torch.func.jacrev(tail)(z).reshape(-1, z.numel())
            A = torch.func.hessian(loss_of_outputs)(tail(z)).reshape(len(J), len(J))
            H = J.mT @ A @ J
        H_z = H.detach().reshape(z.numel(), z.numel())
        return reference.kappa_in_output_space(self.linear.weight, phi, H_z)

    def kappa_weights(self, curvature: str = "hessian") -> Tensor:
        """kappa with the layer's whole Hessian held constant; the gradient goes through the Gram matrix."""
        H = reference.layer_hessian(*self.at_layer()) if curvature == "hessian" else self.layer_ggn()
        return reference.kappa_of_hessian(self.linear.weight, H.detach())

    def cut(self, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The data as batches of the given sizes."""
        by_sample = self.targets.reshape(self.net.batch, -1, *self.targets.shape[1:])
        flattened = len(self.targets) != self.net.batch
        batches = []
        for x, y in zip(self.inputs.split(sizes), by_sample.split(sizes), strict=True):
            batches.append((x, y.flatten(0, 1) if flattened else y.squeeze(1)))
        return batches


def _loss_and_targets(
    loss: Loss, leading: tuple[int, ...], d: int, generator: torch.Generator
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    weight = 0.2 + uniform(d) if loss.weighted else None
    pos_weight = 0.2 + uniform(d) if loss.pos_weighted else None
    if loss.kind in CLASS_INDEX_LOSSES:
        targets = torch.randint(d, leading, generator=generator)
        if loss.kind == "cross_entropy" and loss.ignore_index is not None:
            targets[uniform(*leading) < 0.3] = loss.ignore_index
            targets.view(-1)[0] = 1  # never all ignored
    elif loss.kind == "cross_entropy_probabilities":
        targets = uniform(*leading, d).softmax(-1)
    elif loss.kind in ("bce", "F.bce"):
        targets = uniform(*leading, d)
    elif loss.kind == "poisson":
        targets = torch.floor(3 * uniform(*leading, d))
    else:
        targets = 2 * uniform(*leading, d) - 1

    match loss.kind:
        case "cross_entropy":
            return nn.CrossEntropyLoss(
                weight=weight,
                ignore_index=-100 if loss.ignore_index is None else loss.ignore_index,
                reduction=loss.reduction,
                label_smoothing=loss.label_smoothing,
            ), targets
        case "cross_entropy_probabilities":
            return nn.CrossEntropyLoss(
                weight=weight, reduction=loss.reduction, label_smoothing=loss.label_smoothing
            ), targets
        case "bce":
            return nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction=loss.reduction), targets
        case "mse":
            return nn.MSELoss(reduction=loss.reduction), targets
        case "huber":
            return nn.HuberLoss(reduction=loss.reduction, delta=0.8), targets
        case "smooth_l1":
            return nn.SmoothL1Loss(reduction=loss.reduction, beta=0.8), targets
        case "poisson":
            return nn.PoissonNLLLoss(reduction=loss.reduction), targets
        case "F.cross_entropy":
            return F.cross_entropy, targets
        case "F.bce":
            return F.binary_cross_entropy_with_logits, targets
        case "F.mse":
            return F.mse_loss, targets
        case "nll of log_softmax":
            return lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), targets
        case "focal":
            return _focal, targets
    raise ValueError(loss.kind)


def _focal(z: Tensor, y: Tensor) -> Tensor:
    """Focal loss with exponent 2, which is not convex in the logits."""
    log_p = F.log_softmax(z, 1).gather(1, y[:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


@st.composite
def losses(draw: st.DrawFn, kinds: Sequence[str] = (*KNOWN_LOSSES, *UNKNOWN_LOSSES)) -> Loss:
    return Loss(
        kind=draw(st.sampled_from(kinds)),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        weighted=draw(st.booleans()),
        pos_weighted=draw(st.booleans()),
        ignore_index=draw(st.sampled_from([None, -100, 0])),
        label_smoothing=draw(st.sampled_from([0.0, 0.2])),
    )


@st.composite
def nets(
    draw: st.DrawFn,
    *,
    loss: st.SearchStrategy[Loss] | None = None,
    activations: Sequence[str] = tuple(ACTIVATIONS),
    min_depth: int = 1,
    output_only: bool = False,
    min_batch: int = 1,
    max_positions: int = 3,
    max_width: int = 6,
) -> Net:
    """Nets of one to three Linear layers; the layer under test is the output or a hidden one."""
    depth = draw(st.integers(min_depth, 3))
    hidden = draw(st.lists(st.integers(2, max_width), min_size=depth, max_size=depth))
    return Net(
        seed=draw(st.integers(0, 2**31 - 1)),
        widths=(*hidden, draw(st.integers(2, 5))),
        activation=draw(st.sampled_from(activations)),
        loss=draw(losses() if loss is None else loss),
        batch=draw(st.integers(min_batch, 5)),
        positions=draw(st.integers(0, max_positions)),
        flatten=draw(st.booleans()),
        layer_index=depth - 1 if output_only else draw(st.integers(0, depth - 1)),
        pool=draw(st.booleans()),
    )


def relative_error(found: Tensor | float, expected: Tensor | float) -> float:
    """Largest difference, relative to the largest expected number or 1; infinite where it is not a number."""
    a = torch.as_tensor(found, dtype=torch.float64).detach()
    b = torch.as_tensor(expected, dtype=torch.float64).detach()
    error = ((a - b).abs().max() / max(1.0, b.abs().max().item())).item()
    return error if error == error else float("inf")
