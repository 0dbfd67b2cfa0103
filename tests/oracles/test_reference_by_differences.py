"""The reference against difference quotients of a network written without autograd."""

from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from numpy_net import Weights, cross_entropy, kappa_by_differences, second_derivatives
from torch import nn

from relflat import reference

SIZES = {"W1": (3, 2), "b1": (3,), "W2": (2, 3), "b2": (2,)}
LABELS = [0, 1, 1]
NAMES = {"W1": "0.weight", "b1": "0.bias", "W2": "2.weight", "b2": "2.bias"}


def numbers(seed: int) -> tuple[Weights, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=size) for name, size in SIZES.items()}, rng.normal(size=(3, 2))


def torch_net(weights: Weights) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net.load_state_dict({NAMES[name]: torch.from_numpy(value) for name, value in weights.items()})
    return net


def reference_at(weights: Weights, x: np.ndarray, layer: str) -> tuple:
    net = torch_net(weights)
    loss, W = reference.at_layer(net, nn.CrossEntropyLoss(), torch.from_numpy(x), torch.tensor(LABELS), NAMES[layer])
    return loss, W, net


@pytest.mark.parametrize("layer", ["W1", "W2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_hessian_kappa_and_measures_by_finite_differences(layer: str, seed: int) -> None:
    weights, x = numbers(seed)
    W = weights[layer]
    H = second_derivatives(lambda V: cross_entropy(weights | {layer: V}, x, LABELS, np.exp, np.log), W, h=1e-2)
    d, m = W.shape
    kappa = trace = largest = 0.0
    for s, s_, t in product(range(d), range(d), range(m)):
        kappa += (W[s] @ W[s_]) * H[s, t, s_, t]
    for s in range(d):
        trace += np.trace(H[s, :, s, :])
        largest += (W[s] @ W[s]) * np.linalg.eigvalsh(H[s, :, s, :]).max()

    loss, V, _ = reference_at(weights, x, layer)
    assert reference.layer_hessian(loss, V).detach().cpu().numpy() == pytest.approx(H, abs=1e-6)
    assert reference.kappa(loss, V).item() == pytest.approx(kappa, abs=1e-6)
    assert reference.trace(loss, V).item() == pytest.approx(trace, abs=1e-6)
    assert reference.layerwise(loss, V).item() == pytest.approx(np.sum(W**2) * trace, abs=1e-6)
    assert reference.max_eigenvalue(loss, V).item() == pytest.approx(largest, abs=1e-6)


@pytest.mark.parametrize("layer", ["W1", "W2"])
def test_adaptive_and_normalized_by_finite_differences(layer: str) -> None:
    weights, x = numbers(2)
    W = weights[layer]
    m = W.shape[1]
    std = np.linspace(0.5, 2.0, m)

    def f(V: np.ndarray) -> float:
        return cross_entropy(weights | {layer: V}, x, LABELS, np.exp, np.log)

    in_r = second_derivatives(lambda r: f(W * (1 + r)), np.zeros((1, m)), h=1e-2)
    in_V = second_derivatives(lambda V: f(V / std), W * std, h=1e-2)
    normalized = sum(
        (W[s] * std) @ (W[s_] * std) * np.trace(in_V[s, :, s_, :]) for s, s_ in product(range(len(W)), repeat=2)
    )
    loss, V, _ = reference_at(weights, x, layer)
    assert reference.kappa_adaptive(loss, V).item() == pytest.approx(np.trace(in_r.reshape(m, m)), abs=1e-6)
    assert reference.kappa_normalized(loss, V, torch.from_numpy(std)).item() == pytest.approx(normalized, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["W1", "W2"])
def test_value_and_every_gradient_in_fifty_digits(layer: str) -> None:
    """kappa, and its gradient in all parameters of all layers (FAM paper, Lemma 1), without autograd."""
    weights, x = numbers(3)
    loss, W, net = reference_at(weights, x, layer)
    kappa = reference.kappa(loss, W)
    grads = dict(zip(NAMES, torch.autograd.grad(kappa, list(net.parameters())), strict=True))

    with mpmath.workdps(50):
        exact = {name: _exact(value) for name, value in weights.items()}
        x_exact = _exact(x)
        h, step = mpmath.mpf("1e-12"), mpmath.mpf("1e-9")

        def kappa_at(w: Weights) -> mpmath.mpf:
            def f(V: np.ndarray) -> mpmath.mpf:
                return cross_entropy(w | {layer: V}, x_exact, LABELS, mpmath.exp, mpmath.log)

            return kappa_by_differences(f, w[layer], h)

        assert kappa.item() == pytest.approx(float(kappa_at(exact)), abs=1e-12)
        for name, value in exact.items():
            for index in np.ndindex(value.shape):
                plus, minus = value.copy(), value.copy()
                plus[index] += step
                minus[index] -= step
                slope = (kappa_at(exact | {name: plus}) - kappa_at(exact | {name: minus})) / (2 * step)
                assert grads[name][index].item() == pytest.approx(float(slope), abs=1e-10), (name, index)


def _exact(array: np.ndarray) -> np.ndarray:
    return np.vectorize(mpmath.mpf, otypes=[object])(array)
