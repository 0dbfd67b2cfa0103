"""The fast paths against the reference, on random nets: values, gradients in every parameter, batches."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nets import KNOWN_LOSSES, Loss, Net, Problem, losses, nets, relative_error
from relflat import FAM, reference, relative_flatness

VALUE, GRADIENT = 1e-9, 1e-7
STRENGTH = 0.7
BATCHABLE = (*KNOWN_LOSSES, "huber", "poisson")


def exact_methods(problem: Problem) -> list[str]:
    return ["auto", "exact", "closed_form"] if problem.loss_has_a_closed_form else ["exact"]


# Values


@given(net=nets())
@settings(max_examples=200)
def test_values(net: Net) -> None:
    problem = net.build()
    expected = problem.kappa().item()
    for method in exact_methods(problem):
        flat = relative_flatness(
            problem.model, problem.loss_fn, problem.data, layer=problem.layer, method=method
        )
        assert relative_error(flat.value, expected) < VALUE, method
        assert flat.stderr == 0, method


@given(net=nets())
@settings(max_examples=100)
def test_gauss_newton_values(net: Net) -> None:
    problem = net.build()
    flat = relative_flatness(
        problem.model,
        problem.loss_fn,
        problem.data,
        layer=problem.layer,
        method="exact",
        curvature="ggn",
    )
    assert relative_error(flat.value, problem.kappa("ggn")) < VALUE
    assert flat.curvature == "ggn"


@given(net=nets())
@settings(max_examples=100)
def test_what_is_reported_beside_kappa(net: Net) -> None:
    problem = net.build()
    loss, W = problem.at_layer()
    method = exact_methods(problem)[-1]
    flat = relative_flatness(problem.model, problem.loss_fn, problem.data, layer=problem.layer, method=method)
    assert relative_error(flat.loss, loss(W)) < VALUE
    assert relative_error(flat.weight_norm, W.norm()) < VALUE
    assert flat.samples == net.batch
    assert relative_error(flat.feature_norm2, (problem.features() ** 2).sum() / net.batch) < VALUE
    assert relative_error(flat.layerwise, flat.weight_norm**2 * flat.trace) < VALUE
    allowed = VALUE * max(1, abs(flat.trace)) + 4 * flat.trace_stderr
    assert abs(flat.trace - reference.trace(loss, W).item()) <= allowed


@given(net=nets())
@settings(max_examples=100)
def test_adaptive_values(net: Net) -> None:
    problem = net.build()
    expected = reference.kappa_adaptive(*problem.at_layer())
    for method in exact_methods(problem):
        flat = relative_flatness(
            problem.model, problem.loss_fn, problem.data, layer=problem.layer, method=method, adaptive=True
        )
        assert relative_error(flat.value, expected) < VALUE, method


@given(net=nets(min_batch=2, activations=["tanh", "gelu", "softplus"]))
@settings(max_examples=100)
def test_values_in_normalized_features(net: Net) -> None:
    problem = net.build()
    phi = problem.features().flatten(0, -2)
    expected = reference.kappa_normalized(*problem.at_layer(), phi.std(0, correction=0))
    for method in exact_methods(problem):
        flat = relative_flatness(
            problem.model,
            problem.loss_fn,
            problem.data,
            layer=problem.layer,
            method=method,
            normalize_features=True,
        )
        assert relative_error(flat.value, expected) < VALUE, method


# Batches


@given(net=nets(loss=losses(BATCHABLE), min_batch=2), data=st.data())
@settings(max_examples=100)
def test_values_do_not_depend_on_how_data_are_cut(net: Net, data: st.DataObject) -> None:
    problem = net.build()
    expected = problem.kappa().item()
    first = data.draw(st.integers(1, net.batch - 1))
    for sizes in ([first, net.batch - first], [1] * net.batch):
        for method in exact_methods(problem):
            flat = relative_flatness(
                problem.model, problem.loss_fn, problem.cut(sizes), layer=problem.layer, method=method
            )
            assert relative_error(flat.value, expected) < VALUE, (method, sizes)
            assert relative_error(flat.loss, problem.task_loss()) < VALUE, (method, sizes)
            assert flat.samples == net.batch


# Probes


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_probe_means_lie_within_four_standard_errors(curvature: str) -> None:
    """And the standard errors are honest: over many nets the deviations measured in them are of size one."""
    deviations: list[float] = []

    @given(net=nets(loss=losses(("cross_entropy", "bce", "mse", "huber", "poisson")), min_depth=2))
    @settings(max_examples=100)
    def check(net: Net) -> None:
        problem = net.build()
        expected = problem.kappa(curvature).item()
        flat = relative_flatness(
            problem.model,
            problem.loss_fn,
            problem.data,
            layer=problem.layer,
            method="probe",
            curvature=curvature,
            probes=100,
            seed=net.seed,
        )
        deviation = flat.value - expected
        assert abs(deviation) <= 4 * flat.stderr + VALUE * max(1, abs(expected))
        if flat.stderr > VALUE:
            deviations.append(deviation / flat.stderr)

    check()
    assert len(deviations) > 50
    root_mean_square = math.sqrt(sum(z**2 for z in deviations) / len(deviations))
    assert 0.7 < root_mean_square < 1.4


# Gradients


def gradients(loss: Tensor, problem: Problem) -> dict[str, Tensor]:
    """The gradient in every parameter, zero where there is none."""
    names, parameters = zip(*problem.model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def check_fam(problem: Problem, kappa: Callable[[], Tensor], **options: object) -> None:
    """One training step's value and gradients are those of the task loss plus strength * kappa."""
    task, penalty = problem.task_loss(), STRENGTH * kappa()
    expected = gradients(task + penalty, problem)
    problem.model.train()
    with FAM(problem.loss_fn, problem.model, problem.layer, strength=STRENGTH, **options) as fam:
        loss = fam(problem.model(problem.inputs), problem.targets)
        found = gradients(loss, problem)
        last = dict(fam.last)
    assert relative_error(last["task"], task) < VALUE
    assert relative_error(last["penalty"], penalty) < VALUE
    assert relative_error(last["total"], task + penalty) < VALUE
    assert relative_error(loss, task + penalty) < VALUE
    for name, grad in expected.items():
        assert relative_error(found[name], grad) < GRADIENT, name


@given(net=nets())
@settings(max_examples=200)
def test_full_gradients(net: Net) -> None:
    problem = net.build()
    for method in exact_methods(problem):
        check_fam(problem, problem.kappa, gradient="full", curvature="hessian", method=method)


@given(net=nets())
@settings(max_examples=100)
def test_full_gradients_of_gauss_newton(net: Net) -> None:
    problem = net.build()
    check_fam(problem, lambda: problem.kappa("ggn"), gradient="full", curvature="ggn", method="exact")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@given(net=nets())
@settings(max_examples=100)
def test_frozen_gradients(curvature: str, net: Net) -> None:
    problem = net.build()
    for method in exact_methods(problem):
        check_fam(
            problem,
            lambda: problem.kappa_frozen(curvature),
            gradient="frozen",
            curvature=curvature,
            method=method,
        )


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@given(net=nets())
@settings(max_examples=100)
def test_weights_gradients(curvature: str, net: Net) -> None:
    problem = net.build()
    for method in exact_methods(problem):
        check_fam(
            problem,
            lambda: problem.kappa_weights(curvature),
            gradient="weights",
            curvature=curvature,
            method=method,
        )


@given(net=nets())
@settings(max_examples=50)
def test_adaptive_gradients(net: Net) -> None:
    problem = net.build()

    def kappa() -> Tensor:
        return reference.kappa_adaptive(*problem.at_layer())

    for method in exact_methods(problem):
        check_fam(problem, kappa, gradient="full", curvature="hessian", method=method, adaptive=True)


@given(net=nets(), scale=st.sampled_from([0.25, 1.0, 3.0]))
@settings(max_examples=50)
def test_penalty_of_a_loss_made_elsewhere(net: Net, scale: float) -> None:
    """kappa(c L) = c kappa(L): what a framework multiplies the loss by carries over, in every gradient."""
    problem = net.build()
    kappa = problem.kappa()
    expected = gradients(scale * (problem.task_loss() + STRENGTH * kappa), problem)
    problem.model.train()
    with FAM(
        problem.loss_fn,
        problem.model,
        problem.layer,
        strength=STRENGTH,
        curvature="hessian",
        method="exact",
    ) as fam:
        loss = scale * problem.task_loss()
        penalty = fam.penalty(loss)
        found = gradients(loss + penalty, problem)
    assert relative_error(penalty, scale * STRENGTH * kappa) < VALUE
    for name, grad in expected.items():
        assert relative_error(found[name], grad) < GRADIENT, name


@pytest.mark.parametrize("gradient", ["full", "frozen", "weights"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("activation", "kind", "positions"), [("tanh", "cross_entropy", 0), ("gelu", "bce", 2)]
)
def test_probe_gradients_are_unbiased(
    gradient: str, curvature: str, activation: str, kind: str, positions: int
) -> None:
    """Over many seeds, the penalty and its gradient along the expected one have the right means."""
    net = Net(
        seed=5,
        widths=(3, 4, 3, 3),
        activation=activation,
        loss=Loss(kind),
        batch=4,
        positions=positions,
        flatten=True,
        layer_index=1,
    )
    problem = net.build()
    kappa = {
        "full": problem.kappa,
        "frozen": problem.kappa_frozen,
        "weights": problem.kappa_weights,
    }[gradient](curvature)
    problem.model.train()
    task = gradients(problem.task_loss(), problem)
    expected = gradients(STRENGTH * kappa, problem)
    reached = [name for name, grad in expected.items() if grad.abs().max() > 0]

    samples: dict[str, list[float]] = {name: [] for name in ["penalty", *reached]}
    for seed in range(200):
        with FAM(
            problem.loss_fn,
            problem.model,
            problem.layer,
            strength=STRENGTH,
            gradient=gradient,
            curvature=curvature,
            method="probe",
            probes=1,
            seed=seed,
        ) as fam:
            loss = fam(problem.model(problem.inputs), problem.targets)
            found = gradients(loss, problem)
            samples["penalty"].append(fam.last["penalty"])
        for name, grad in expected.items():
            if name in reached:
                samples[name].append(((found[name] - task[name]) * grad).sum().item() / grad.norm().item())
            else:
                assert relative_error(found[name], task[name]) < GRADIENT, name

    means = {name: expected[name].norm().item() for name in reached}
    means["penalty"] = STRENGTH * kappa.item()
    for name, values in samples.items():
        mean, error = _mean_and_error(values)
        assert abs(mean - means[name]) <= 4 * error + VALUE, name


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(values))).item()
