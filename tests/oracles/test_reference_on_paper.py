"""The reference against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relflat import reference

# One sample, two classes, and weights that make both logits 4, so p = (1/2, 1/2):
# d2 L / dz2 = 1/4 [[1, -1], [-1, 1]],   H_{s,s'} = (d2 L / dz2)_{s,s'} phi phi',   ||phi||^2 = 5.
PHI = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
W = torch.tensor([[2.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
LABEL = torch.tensor([0])


def two_by_two(V: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(PHI @ V.T, LABEL)


def test_two_by_two_hessian() -> None:
    phi_phi = np.array([[1.0, 2.0], [2.0, 4.0]])
    H = reference.layer_hessian(two_by_two, W).cpu().numpy()
    assert H[0, :, 0, :] == pytest.approx(phi_phi / 4)
    assert H[0, :, 1, :] == pytest.approx(-phi_phi / 4)
    assert H[1, :, 0, :] == pytest.approx(-phi_phi / 4)
    assert H[1, :, 1, :] == pytest.approx(phi_phi / 4)


def test_two_by_two_measures() -> None:
    # <w1,w1> = 5, <w2,w2> = 4, <w1,w2> = 2, each trace is +- 5/4: 5/4 (5 - 2 - 2 + 4) = 6.25
    assert reference.kappa(two_by_two, W).item() == pytest.approx(6.25)
    # phi_1^2 (2 - 0)^2 / 4 + phi_2^2 (1 - 2)^2 / 4
    assert reference.kappa_adaptive(two_by_two, W).item() == pytest.approx(2.0)
    # with std (1, 2): phi = (1, 1), w1 - w2 = (2, 2) - (0, 4), so 2 * 8 / 4
    std = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert reference.kappa_normalized(two_by_two, W, std).item() == pytest.approx(4.0)
    assert reference.trace(two_by_two, W).item() == pytest.approx(2.5)
    assert reference.layerwise(two_by_two, W).item() == pytest.approx((5 + 4) * 2.5)
    assert reference.max_eigenvalue(two_by_two, W).item() == pytest.approx((5 + 4) * 1.25)


@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_two_by_two_feature_robustness(delta: float) -> None:
    # A swaps the two features: W A phi = (5, 2), the difference of the logits becomes 3 delta, and
    # the mean of log(1 + exp(-3 delta)) and log(1 + exp(3 delta)), less log 2, is log cosh(3 delta / 2).
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    measured = reference.feature_robustness(two_by_two, W, [swap, -swap], delta)
    assert measured.item() == pytest.approx(math.log(math.cosh(1.5 * delta)))


def test_softmax_regression_has_the_known_hessian() -> None:
    rng = np.random.default_rng(0)
    V, phi, y = rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), rng.integers(0, 4, size=6)
    loss, W = _dense(V, nn.CrossEntropyLoss(), phi, torch.from_numpy(y))
    p = np.exp(phi @ V.T)
    p /= p.sum(1, keepdims=True)
    H = np.zeros((4, 3, 4, 3))
    kappa = 0.0
    for p_i, phi_i in zip(p, phi, strict=True):
        H += np.einsum("sc,t,u->stcu", np.diag(p_i) - np.outer(p_i, p_i), phi_i, phi_i) / 6
        mean_row = p_i @ V
        kappa += (phi_i @ phi_i) * sum(p_i[c] * np.sum((V[c] - mean_row) ** 2) for c in range(4)) / 6
    assert reference.layer_hessian(loss, W).detach().cpu().numpy() == pytest.approx(H, abs=1e-14)
    assert reference.kappa(loss, W).item() == pytest.approx(kappa, abs=1e-13)


def test_linear_regression() -> None:
    rng = np.random.default_rng(1)
    V, phi, y = rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), rng.normal(size=(6, 4))
    loss, W = _dense(V, nn.MSELoss(), phi, torch.from_numpy(y))
    assert reference.kappa(loss, W).item() == pytest.approx(2 / 4 * np.sum(V**2) * np.sum(phi**2) / 6)
    loss, W = _dense(V, nn.MSELoss(reduction="sum"), phi, torch.from_numpy(y))
    assert reference.kappa(loss, W).item() == pytest.approx(2 * np.sum(V**2) * np.sum(phi**2))


def test_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    V, phi, y = rng.normal(size=(2, 3)), rng.normal(size=(5, 3)), rng.uniform(size=(5, 2))
    loss, W = _dense(V, nn.BCEWithLogitsLoss(), phi, torch.from_numpy(y))
    p = 1 / (1 + np.exp(-phi @ V.T))
    kappa = sum(
        p[i, s] * (1 - p[i, s]) * (V[s] @ V[s]) * (phi[i] @ phi[i]) / (2 * 5) for i in range(5) for s in range(2)
    )
    assert reference.kappa(loss, W).item() == pytest.approx(kappa)


def _dense(V: np.ndarray, loss_fn: nn.Module, phi: np.ndarray, y: torch.Tensor) -> tuple:
    layer = nn.Linear(V.shape[1], V.shape[0], bias=False).double()
    layer.weight.data = torch.from_numpy(V.copy())
    return reference.at_layer(layer, loss_fn, torch.from_numpy(phi), y, "weight")


def test_gauss_newton_of_one_tanh() -> None:
    # z = tanh(w x), L = z^2 / 2: J = x (1 - z^2), A = 1, and the Hessian has - 2 x^2 z^2 (1 - z^2) more.
    w, x = 0.7, 1.3
    z = math.tanh(w * x)
    W = torch.tensor([[w]], dtype=torch.float64)
    ggn = reference.kappa_ggn(lambda V: torch.tanh(V * x), lambda z: (z**2).sum() / 2, W).item()
    hessian = reference.kappa(lambda V: (torch.tanh(V * x) ** 2).sum() / 2, W).item()
    assert ggn == pytest.approx(w**2 * x**2 * (1 - z**2) ** 2)
    assert hessian == pytest.approx(w**2 * x**2 * ((1 - z**2) ** 2 - 2 * z**2 * (1 - z**2)))


def test_a_weight_used_twice() -> None:
    # outputs w (w x), L = w^4 x^2, L'' = 12 w^2 x^2, kappa = w^2 L''
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    net = Twice()
    net.layer.weight.data.fill_(0.9)
    x = torch.tensor([[1.5]], dtype=torch.float64)
    loss, W = reference.at_layer(net, nn.MSELoss(), x, torch.zeros_like(x), "layer")
    assert reference.kappa(loss, W).item() == pytest.approx(12 * 0.9**4 * 1.5**2)


def test_a_convolution_is_a_matrix_on_patches() -> None:
    # Two positions of a (1, 2) kernel over three numbers, summed: z = (a, b) . ((x1, x2) + (x2, x3)).
    net = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=False), nn.Flatten()).double()
    net[0].weight.data = torch.tensor([[[[0.5, -2.0]]]], dtype=torch.float64)
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64)
    loss, W = reference.at_layer(net, lambda z, _: z.sum() ** 2, x, None, "0")
    assert W.tolist() == [[0.5, -2.0]]
    # sum of patches (3, 6), Hessian 2 (3, 6)(3, 6)', trace 90, ||w||^2 = 4.25
    assert reference.kappa(loss, W).item() == pytest.approx(4.25 * 90)
