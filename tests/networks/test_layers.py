"""Every class of layer against Def. 3 with the dense Hessian in its own weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from relflat import reference, relative_flatness
from relflat.capture.kinds import kind_of
from unbounded import FAM

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.slow


def conv1d_of_gpt2(nf: int, nx: int) -> nn.Module:
    """What transformers calls Conv1D: a dense layer that keeps its weight as (m, d)."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
            self.bias = nn.Parameter(torch.zeros(nf))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    return Conv1D()


class Head(nn.Module):
    """A layer, something smooth and coupling positions, then classes."""

    def __init__(self, layer: nn.Module, out: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).tanh()
        z = z.flatten(1) if z.ndim > 1 else z
        return self.head(z / (1 + z.square().mean(-1, keepdim=True)))


@dataclass
class Case:
    layer: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    out: int
    matrix: Callable[[Tensor], Tensor] = lambda w: w.flatten(1)


def image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, *shape)


def transposed(groups: int = 1) -> Callable[[Tensor], Tensor]:
    def matrix(w: Tensor) -> Tensor:  # (in, out / g, *k) -> (out, in / g * k), whatever the order of the features
        w = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
        return w.reshape(w.shape[0] * w.shape[1], -1)

    return matrix


CASES = {
    "linear": Case(lambda: nn.Linear(4, 3), image(4), 3),
    "linear no batch": Case(lambda: nn.Linear(4, 3), lambda: torch.randn(4), 3),
    "linear on tokens": Case(lambda: nn.Linear(4, 3), image(2, 4), 6),
    "linear on a grid": Case(lambda: nn.Linear(4, 2), image(2, 2, 4), 8),
    "linear without bias": Case(lambda: nn.Linear(4, 3, bias=False), image(4), 3),
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 3, padding=1), image(2, 4), 12),
    "conv2d": Case(lambda: nn.Conv2d(2, 3, 2), image(2, 3, 3), 12),
    "conv2d stride padding dilation": Case(
        lambda: nn.Conv2d(2, 2, 2, stride=2, padding=(1, 2), dilation=2), image(2, 4, 3), 12
    ),
    "conv2d same circular": Case(
        lambda: nn.Conv2d(1, 2, (2, 3), padding="same", padding_mode="circular"), image(1, 3, 3), 18
    ),
    "conv2d reflect": Case(lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), image(1, 2, 3), 12),
    "conv2d groups": Case(lambda: nn.Conv2d(4, 6, 2, groups=2), image(4, 2, 3), 12),
    "conv2d groups of one window": Case(lambda: nn.Conv2d(4, 6, 2, groups=2), image(4, 2, 2), 6),
    "conv2d depthwise": Case(lambda: nn.Conv2d(3, 6, 2, groups=3, padding=1), image(3, 2, 1), 36),
    "conv2d 1x1": Case(lambda: nn.Conv2d(3, 2, 1), image(3, 2, 2), 8),
    "conv3d": Case(lambda: nn.Conv3d(1, 2, 2, padding=(0, 1, 0)), image(1, 2, 2, 3), 12),
    "conv transpose 1d": Case(lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), image(2, 2), 12, transposed()),
    "conv transpose 2d": Case(
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1), image(2, 2, 1), 16, transposed()
    ),
    "conv transpose 2d groups dilation": Case(
        lambda: nn.ConvTranspose2d(4, 4, 2, groups=2, dilation=2), image(4, 1, 2), 48, transposed(2)
    ),
    "conv transpose 3d": Case(lambda: nn.ConvTranspose3d(1, 2, 2, stride=1), image(1, 1, 1, 2), 24, transposed()),
    "embedding": Case(lambda: nn.Embedding(5, 3), lambda: torch.tensor([[0, 3, 3], [1, 4, 0]]), 9, lambda w: w.mT),
    "embedding with padding": Case(
        lambda: nn.Embedding(5, 3, padding_idx=0), lambda: torch.tensor([[0, 3, 3], [1, 4, 0]]), 9, lambda w: w.mT
    ),
    "Conv1D of GPT-2": Case(lambda: conv1d_of_gpt2(3, 4), image(2, 4), 6, lambda w: w.mT),
}
FEW_PROBES = 200


def build(name: str) -> tuple[nn.Module, Tensor, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """The model, its data, the loss as a function of W, and W."""
    torch.manual_seed(0)
    case = CASES[name]
    x = case.x()
    layer = case.layer()
    out = layer(x).flatten(1).shape[-1] if x.ndim > 1 else layer(x).numel()
    model = Head(layer, out).double()
    x = x.double() if x.is_floating_point() else x
    y = torch.randint(3, model(x).shape[:1]) if model(x).ndim > 1 else torch.randint(3, ())
    weight = layer.weight.detach().double()
    W, back = torch.func.vjp(case.matrix, weight)

    def loss(V: Tensor) -> Tensor:
        return CE(functional_call(model, {"layer.weight": back(V)[0]}, (x,)), y)

    return model, x, y, loss, W


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, adaptive: bool) -> None:
    model, x, y, loss, W = build(name)
    definition = reference.kappa_adaptive if adaptive else reference.kappa
    want = float(definition(loss, W))
    options: dict[str, Any] = {"layer": "layer", "adaptive": adaptive}
    flat = relative_flatness(model, CE, (x, y), method="exact", **options)
    assert flat.value == pytest.approx(want, rel=1e-9, abs=1e-10)
    if not adaptive:
        assert flat.trace == pytest.approx(float(reference.trace(loss, W)), rel=1e-9)
    probe = relative_flatness(model, CE, (x, y), method="probe", probes=FEW_PROBES, **options)
    assert abs(probe.value - want) < 4.5 * probe.stderr
    assert abs(probe.trace - flat.trace) < 4.5 * probe.trace_stderr + 1e-10
    assert flat.weight_norm == pytest.approx(float(W.norm()))


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton(name: str) -> None:
    model, x, y, _, W = build(name)
    case = CASES[name]
    _, back = torch.func.vjp(case.matrix, model.layer.weight.detach())
    outputs = lambda V: functional_call(model, {"layer.weight": back(V)[0]}, (x,))
    want = float(reference.kappa_ggn(outputs, lambda z: CE(z, y), W))
    flat = relative_flatness(model, CE, (x, y), layer="layer", method="exact", curvature="ggn")
    assert flat.value == pytest.approx(want, rel=1e-9)
    probe = relative_flatness(model, CE, (x, y), layer="layer", method="probe", curvature="ggn", probes=FEW_PROBES)
    assert abs(probe.trace - flat.trace) < 4.5 * probe.trace_stderr + 1e-10
    assert abs(probe.value - want) < 4.5 * probe.stderr
    assert abs(probe.trace - flat.trace) < 4.5 * probe.trace_stderr


@pytest.mark.parametrize("method", ["exact", "probe"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, method: str) -> None:
    """Exact: in every parameter as autograd through the dense definition. Probes: on average over many.

    A batch of copies has the same mean loss, and every sample has probes of its own: k copies with 1000 / k probes
    average as many.
    """
    model, x, y, _, _ = build(name)
    case = CASES[name]
    _, back = torch.func.vjp(case.matrix, model.layer.weight.detach())
    want = torch.autograd.grad(
        reference.kappa(loss_with_graph(model, x, y, back), case.matrix(model.layer.weight)), list(model.parameters())
    )
    copies = 40 if method == "probe" and y.ndim else 1
    x, y = (t.repeat(copies, *[1] * (t.ndim - 1)) if y.ndim else t for t in (x, y))
    n = 1 if method == "exact" else 1000 // copies
    fam = FAM(CE, model, "layer", strength=1.0, curvature="hessian", method=method, probes=n, seed=1)
    task = CE(model(x), y)
    got = torch.autograd.grad(fam(model(x), y) - task, list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        if method == "exact":
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        else:
            assert float((a - b).norm()) < 0.25 * float(b.norm()) + 0.02


def loss_with_graph(
    model: nn.Module, x: Tensor, y: Tensor, back: Callable[[Tensor], Any]
) -> Callable[[Tensor], Tensor]:
    parameters = dict(model.named_parameters())
    return lambda V: CE(functional_call(model, parameters | {"layer.weight": back(V)[0]}, (x,)), y)


def test_no_batch() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 2).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(0), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 3, 2).double(), torch.tensor(1)
    loss, W = reference.at_layer(model, CE, x, y, "0")
    flat = relative_flatness(model, CE, (x, y), layer="0", method="exact")
    assert flat.value == pytest.approx(float(reference.kappa(loss, W)), rel=1e-9)


def test_a_single_number() -> None:
    """``(w x + b - t)^2`` of one vector, on paper: kappa is ``2 ||x||^2 ||w||^2``."""
    layer = nn.Linear(4, 1).double()
    model = nn.Sequential(layer, nn.Flatten(0), nn.Unflatten(0, (1, 1)), nn.Flatten(0))
    x, t = torch.randn(4).double(), torch.tensor(0.3).double()
    want = 2 * float(x.square().sum() * layer.weight.detach().square().sum())
    loss_fn = lambda z, t: nn.functional.mse_loss(z.reshape(()), t)
    for form in (loss_fn, lambda z, t: (z.reshape(()) - t).square()):
        for method in ("auto", "exact"):
            flat = relative_flatness(model, form, (x, t), layer="0", method=method)
            assert flat.value == pytest.approx(want, rel=1e-9)
    number = nn.Sequential(layer, nn.Flatten(0))
    number.forward = lambda x: layer(x).squeeze()
    flat = relative_flatness(number, nn.MSELoss(), (x, t), layer="0")
    assert (flat.method, flat.value) == ("closed_form", pytest.approx(want, rel=1e-9))


def test_project_is_b_dot_phi() -> None:
    for name in CASES:
        if "no batch" in name:
            continue
        model, x, *_ = build(name)
        kind = kind_of(model.layer)
        phi = kind.features(model.layer, x)
        b = torch.randn(x.shape[0], 2, phi.shape[-1], dtype=torch.float64)
        torch.testing.assert_close(kind.project(model.layer, x, b), torch.einsum("ntcm,nqm->ntcq", phi, b))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_channel_groups_of_samples_that_are_coupled(curvature: Any, adaptive: bool) -> None:
    """By BatchNorm in training mode: the whole batch is one group, and each of its parts has channel groups."""
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    model, x, y = nn.Sequential(*parts).double(), torch.randn(4, 4, 2, 3).double(), torch.randint(3, (4,))
    outputs = lambda V: functional_call(model, {"0.weight": V.reshape(6, 2, 2, 2)}, (x,))
    W, loss = model[0].weight.detach().flatten(1), lambda V: CE(outputs(V), y)
    options: dict[str, Any] = {"strength": 1.0, "curvature": curvature, "adaptive": adaptive, "seed": 0}
    with FAM(CE, model, "0", method="exact", **options) as fam:
        fam(model(x), y)
        found = fam.last["kappa"]
    with FAM(CE, model, "0", method="probe", probes=1000, **options) as fam:
        fam(model(x), y)
        assert fam.last["kappa"] == pytest.approx(found, rel=0.25)
    if curvature == "hessian":
        definition = reference.kappa_adaptive if adaptive else reference.kappa
        assert found == pytest.approx(float(definition(loss, W)), rel=1e-9)
    elif not adaptive:
        assert found == pytest.approx(float(reference.kappa_ggn(outputs, lambda z: CE(z, y), W)), rel=1e-9)
