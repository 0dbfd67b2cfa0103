"""I8: under random orthogonal feature matrices the loss grows as delta^2 / (2 m) kappa (theory paper)."""

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nets import KNOWN_LOSSES, Loss, Net, Problem, losses, nets, relative_error
from relflat import reference, relative_flatness
from unbounded import FAM

DELTAS = (0.08, 0.04, 0.02)
SMOOTH = ("tanh", "gelu", "softplus")
SMOOTH_LOSSES = (*KNOWN_LOSSES, "poisson", "focal")


def library_kappa(problem: Problem) -> float:
    return relative_flatness(problem.model, problem.loss_fn, problem.data, layer=problem.layer, method="exact").value


def signed_permutations(m: int) -> list[Tensor]:
    """All 2^m m! of them: a finite group with the second moments of all orthogonal matrices."""
    identity = torch.eye(m, dtype=torch.float64)
    return [
        identity[list(order)] * torch.tensor(signs, dtype=torch.float64)
        for order in permutations(range(m))
        for signs in product([1.0, -1.0], repeat=m)
    ]


def curvature_in_the_limit(loss: reference.LossOfWeight, W: Tensor, matrices: list[Tensor]) -> float:
    """2 m / delta^2 times the feature robustness, extrapolated twice to delta = 0 (Richardson)."""
    m = W.shape[1]
    a, b, c = (2 * m / delta**2 * reference.feature_robustness(loss, W, matrices, delta).item() for delta in DELTAS)
    ab, bc = (4 * b - a) / 3, (4 * c - b) / 3  # removes delta^2
    return (16 * bc - ab) / 15  # removes delta^4


@given(net=nets(activations=SMOOTH, max_positions=2, max_width=3, loss=losses(SMOOTH_LOSSES)))
@settings(max_examples=30)
def test_all_signed_permutations_give_kappa_without_sampling_error(net: Net) -> None:
    problem = net.build()
    loss, W = problem.at_layer()
    with torch.no_grad():
        measured = curvature_in_the_limit(loss, W, signed_permutations(W.shape[1]))
    assert relative_error(measured, library_kappa(problem)) < 1e-5


@pytest.mark.parametrize(("layer", "activation"), [(1, "relu"), (0, "tanh"), (1, "gelu")])
def test_random_orthogonal_matrices_give_kappa_within_their_error(layer: int, activation: str) -> None:
    problem = Net(
        seed=3,
        widths=(5, 5, 3),
        activation=activation,
        loss=Loss("cross_entropy"),
        batch=5,
        positions=0,
        flatten=False,
        layer_index=layer,
    ).build()
    loss, W = problem.at_layer()
    with torch.no_grad():
        limits = torch.tensor([curvature_in_the_limit(loss, W, [A, -A]) for A in random_orthogonal(5, count=300)])
    error = (limits.std() / math.sqrt(len(limits))).item()
    kappa = library_kappa(problem)
    assert error < 0.1 * abs(kappa)
    assert abs(limits.mean().item() - kappa) < 4 * error


def test_the_remainder_is_of_fourth_order() -> None:
    problem = Net(
        seed=4,
        widths=(3, 3, 3),
        activation="tanh",
        loss=Loss("cross_entropy"),
        batch=5,
        positions=0,
        flatten=False,
        layer_index=1,
    ).build()
    loss, W = problem.at_layer()
    kappa, matrices = library_kappa(problem), signed_permutations(3)
    remainders = [
        reference.feature_robustness(loss, W, matrices, delta).item() - delta**2 / (2 * 3) * kappa
        for delta in (0.2, 0.1)
    ]
    assert remainders[0] / remainders[1] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_finite_radius_is_feature_robustness_before_the_limit(strength: float, adaptive: bool, layer: int) -> None:
    """Over many seeds FAM's loss and gradients have the mean of L + strength E[L(phi perturbed) - L].

    Each copy of a sample has noise of its own: 20 of them average as many draws as 20 seeds do.
    """
    problem = Net(
        seed=6,
        widths=(3, 4, 3),
        activation="tanh",
        loss=Loss("cross_entropy"),
        batch=4,
        positions=0,
        flatten=False,
        layer_index=layer,
    ).build()
    problem.model.train()
    radius, parameters = 0.6, list(problem.model.parameters())
    penalty = loss_under_noise(problem, radius, adaptive) - problem.task_loss()
    expected = problem.task_loss() + strength * penalty
    directions = torch.autograd.grad(expected, parameters)

    inputs, targets = (torch.cat([t] * 20) for t in problem.data)
    losses, slopes = [], []
    for seed in range(50):
        with FAM(
            problem.loss_fn,
            problem.model,
            problem.layer,
            strength=strength,
            radius=radius,
            adaptive=adaptive,
            seed=seed,
        ) as fam:
            loss = fam(problem.model(inputs), targets)
            grads = torch.autograd.grad(loss, parameters)
        losses.append(loss.detach())
        slopes.append(torch.stack([(g * d).sum() / d.norm() for g, d in zip(grads, directions, strict=True)]))
    assert_mean(torch.stack(losses), expected.detach())
    assert_mean(torch.stack(slopes), torch.stack([d.norm() for d in directions]))


def loss_under_noise(problem: Problem, radius: float, adaptive: bool, draws: int = 100_000) -> Tensor:
    """E[L(phi + radius ||phi|| u)], u uniform on the unit sphere; adaptive: E[L(phi (1 + radius eps))]."""
    phi = problem.features()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(draws, *phi.shape, generator=generator, dtype=torch.float64)
    if adaptive:
        perturbed = phi * (1 + radius * noise)
    else:
        unit = noise / noise.norm(dim=-1, keepdim=True)
        perturbed = phi + radius * phi.norm(dim=-1, keepdim=True) * unit
    outputs = problem.model[2 * problem.net.layer_index :](perturbed)
    return problem.loss_fn(outputs.flatten(0, 1), problem.targets.repeat(draws))


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean over the first dimension lies within four standard errors of what is expected."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert bool(((samples.mean(0) - expected).abs() <= 4 * error + 1e-3 * expected.abs().clamp(max=1)).all())


def random_orthogonal(m: int, count: int) -> list[Tensor]:
    """Haar-distributed: QR of a Gaussian matrix, with the signs of R's diagonal."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for _ in range(count):
        Q, R = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
        matrices.append(Q * R.diagonal().sign())
    return matrices
