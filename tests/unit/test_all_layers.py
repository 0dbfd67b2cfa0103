"""All layers at once: one product or one pull-back for all of them, and the parts that make it cheap."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relflat import relative_flatness_by_layer
from relflat.capture.graph import piecewise_linear
from relflat.capture.kinds import kind_of
from relflat.curvature import torch_norms as norms
from relflat.estimate import products
from relflat.measure.undisturbed import backward_passes
from relflat.rng import Rng

CE = nn.CrossEntropyLoss()


def net(activation: Callable[[], nn.Module], *sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def data(samples: int, features: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, features).double(), torch.randint(classes, (samples,))


def by_layer(model: nn.Module, given: Any, **options: Any) -> dict[str, Any]:
    return relative_flatness_by_layer(model, CE, given, layer=["0", "2", "4"], **options)


def test_the_mean_over_all_signs_of_a_joint_product_is_each_layers_own_kappa(monkeypatch) -> None:
    """What mixes layers cancels: every combination of signs of two layers, one after the other."""
    model, given = net(nn.Tanh, 2, 2, 2), data(1, 2, 2)
    bits: Iterator[int] = iter(())

    def signs(self: Rng, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.tensor([next(bits) for _ in range(int(torch.Size(shape).numel()))]).reshape(shape).to(like)

    options: dict[str, Any] = {"layer": ["0", "2"], "method": "probe", "probes": 1}
    want = relative_flatness_by_layer(model, CE, given, layer=["0", "2"], method="exact")
    monkeypatch.setattr(Rng, "signs", signs)
    monkeypatch.setattr(products, "_RANK", 1)
    monkeypatch.setattr("relflat.estimate.subject.piecewise_linear", lambda root, ends: False)
    kappas, traces = [], []
    for combination in itertools.product((-1, 1), repeat=8):  # two signs of each layer for kappa, two for Tr H
        bits = iter(combination)
        found = relative_flatness_by_layer(model, CE, given, **options)
        assert next(bits, None) is None
        kappas.append([f.value for f in found.values()])
        traces.append([f.trace for f in found.values()])
    means = torch.tensor([kappas, traces], dtype=torch.float64).mean(1)
    for i, f in enumerate(want.values()):
        assert float(means[0, i]) == pytest.approx(f.value, rel=1e-9)
        assert float(means[1, i]) == pytest.approx(f.trace, rel=1e-9)
    assert float(torch.tensor(kappas).std(0).min()) > 1e-3  # single products are not exact


def test_errors_of_joint_products_are_honest_in_every_layer() -> None:
    torch.manual_seed(0)
    model, given = net(nn.Tanh, 6, 8, 8, 3), data(24, 6, 3)
    want = by_layer(model, given, method="exact")
    found = [by_layer(model, given, method="probe", probes=8, seed=seed) for seed in range(60)]
    assert found[0]["0"].method == "probe(hessian, 8)"
    z = torch.tensor([[(f[k].value - want[k].value) / f[k].stderr for k in want] for f in found])
    assert float((z.abs() > 2).double().mean()) <= 0.07
    assert float(z.square().mean(0).min()) > 0.1  # not so wide that they say nothing
    assert float(z.mean(0).abs().max()) < 0.5


@pytest.mark.parametrize(("activation", "same"), [(nn.ReLU, True), (nn.LeakyReLU, True), (nn.GELU, False)])
def test_behind_pieces_that_are_linear_the_hessian_is_measured_as_the_gauss_newton_matrix(activation, same) -> None:
    model, given = net(activation, 6, 8, 8, 3), data(16, 6, 3)
    hessian, ggn = (by_layer(model, given, method="probe", curvature=c, seed=3) for c in ("hessian", "ggn"))
    for name in ("0", "2"):
        assert (hessian[name].value == ggn[name].value) == same
        assert hessian[name].method == "probe(hessian, 16)"


@pytest.mark.parametrize(("activation", "most"), [(nn.ReLU, 6), (nn.GELU, 8)])
def test_more_layers_take_no_more_products(activation, most) -> None:
    """Backward passes of four probes; each layer adds no more than a few that settle what it is."""
    deep, shallow = net(activation, 6, *[8] * 8, 3), net(activation, 6, *[8] * 4, 3)
    counts = []
    for model in (shallow, deep):
        before = backward_passes()
        relative_flatness_by_layer(model, CE, data(1, 6, 3), layer="*", method="probe", probes=4)
        counts.append(backward_passes() - before)
    assert counts[0] == counts[1]
    assert counts[0] <= (1 + 2 * 8 if activation is nn.GELU else 4) + most


PIECES: list[tuple[Callable[[Tensor], Tensor], bool]] = [
    (lambda z: z.relu() @ torch.ones(3, 2), True),
    (lambda z: nn.functional.conv1d(z[:, None], torch.ones(1, 1, 2)), True),
    (lambda z: nn.functional.max_pool2d(z.reshape(1, 1, 2, 3), 2), True),
    (lambda z: nn.BatchNorm1d(3).eval()(z), True),
    (lambda z: nn.BatchNorm1d(3)(z), False),
    (lambda z: z * z, False),
    (lambda z: z * z.sum(), False),
    (lambda z: z.tanh(), False),
    (lambda z: z.cumsum(0), False),  # linear, and not among those that are known
    (lambda z: 2 / z, False),
    (lambda z: z * (z > 0), True),
]


@pytest.mark.parametrize(("tail", "want"), PIECES)
def test_what_is_piecewise_linear(tail: Callable[[Tensor], Tensor], want: bool) -> None:
    z = torch.randn(2, 3, requires_grad=True) * 1
    out = tail(z)
    assert piecewise_linear(out.grad_fn, {z.grad_fn}) == want
    if want:  # as autograd has it
        (g,) = torch.autograd.grad(out, z, torch.ones_like(out), create_graph=True)
        second = torch.autograd.grad(g.sum(), z, allow_unused=True)[0] if g.requires_grad else None
        assert second is None or not bool(second.any())


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense": (nn.Linear(4, 5), (3, 2, 4)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (3, 4, 7, 7)),
    "groups": (nn.Conv2d(4, 6, 3, padding=(1, 2), dilation=2, groups=2), (3, 4, 7, 7)),
    "same": (nn.Conv1d(4, 6, 4, padding="same"), (3, 4, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (3, 4, 7, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_directions_for_all_samples_are_those_of_each(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    kind, x = kind_of(layer), torch.randn(shape)
    assert kind is not None
    features = kind.features(layer, x)
    b = torch.randn(1, 2, features.shape[-1])
    for given in (b, b.expand(3, -1, -1)):
        torch.testing.assert_close(kind.project(layer, x, given), torch.einsum("ntcm,qm->ntcq", features, b[0]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_rule_for_convolutions_against_pytorchs_own(groups: int, transposed: bool) -> None:
    """It is used where there is a GPU; the rule itself runs anywhere."""
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 6, 3, stride=2, padding=1, groups=groups).double()
    x = torch.randn(2, 4, 6, 6).double().requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y).requires_grad_()
    (found,) = torch.autograd.grad(y, x, grad, create_graph=True)
    v = torch.randn_like(x)
    want = torch.autograd.grad(found, [grad, layer.weight], v)
    rule = norms._MENDED["ConvolutionBackward0"][0](y.grad_fn)
    torch.testing.assert_close(rule.composed(grad, x, layer.weight), found)
    in_grad, in_x, in_weight = rule.once(v, found, [grad.detach(), x, layer.weight.detach()], [True] * 3)
    assert in_x is None
    torch.testing.assert_close(in_grad, want[0])
    torch.testing.assert_close(in_weight, want[1])
