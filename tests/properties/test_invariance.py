"""What relative flatness is and is not invariant to (design notes, section 1)."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nets import KNOWN_LOSSES, Loss, Net, Problem, losses, nets, relative_error
from relflat import reference, relative_flatness, reparam

SAME = 1e-9
DIFFERENT = 1e-3
CLASSIFICATION = losses(("cross_entropy", "cross_entropy_probabilities"))
factors = st.floats(0.05, 20)


def kappas(problem: Problem, model: nn.Module, layer: str, **options: object) -> list[float]:
    """kappa by the library and, where it is the plain one, by the reference."""
    values = [
        relative_flatness(model, problem.loss_fn, problem.data, layer=layer, method=method, **options).value
        for method in (["exact", "auto"] if layer == "output" else ["exact"])
    ]
    if not options:
        name = str(len(model) - 1) if layer == "output" else layer
        values.append(
            reference.kappa(*reference.at_layer(model, problem.loss_fn, *problem.data, name)).item()
        )
    return values


def assert_same(found: list[float], expected: list[float]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < SAME


def relu_nets(min_depth: int = 2) -> st.SearchStrategy[Net]:
    return nets(activations=["relu"], min_depth=min_depth, max_positions=0, loss=CLASSIFICATION)


@given(net=relu_nets(), factor=factors)
@settings(max_examples=50)
def test_rescaling_a_layer_against_the_one_before(net: Net, factor: float) -> None:
    problem = net.build()
    for index in range(2, len(problem.model), 2):
        before = kappas(problem, problem.model, str(index))
        model = copy.deepcopy(problem.model)
        reparam.rescale_layer(model[index - 2], model[index - 1], model[index], factor)
        assert_same(kappas(problem, model, str(index)), before)


@given(net=relu_nets(), data=st.data())
@settings(max_examples=50)
def test_rescaling_output_neurons_against_the_next_layer(net: Net, data: st.DataObject) -> None:
    problem = net.build()
    for index in range(0, len(problem.model) - 2, 2):
        before = kappas(problem, problem.model, str(index))
        model = copy.deepcopy(problem.model)
        d = model[index].out_features
        scales = torch.tensor(data.draw(st.lists(factors, min_size=d, max_size=d)), dtype=torch.float64)
        reparam.rescale_neurons(model[index], model[index + 1], model[index + 2], scales)
        assert_same(kappas(problem, model, str(index)), before)


@given(net=relu_nets(), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_random_rescaling_of_the_whole_network(net: Net, seed: int) -> None:
    problem = net.build()
    model = copy.deepcopy(problem.model)
    reparam.random_rescaling(model, generator=torch.Generator().manual_seed(seed))
    for index in range(0, len(model), 2):
        assert_same(kappas(problem, model, str(index)), kappas(problem, problem.model, str(index)))


def output_replaced(problem: Problem, replacement: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*problem.model[:-1], *replacement)


@given(net=nets(output_only=True, max_positions=0))
@settings(max_examples=50)
def test_rotating_features(net: Net) -> None:
    problem = net.build()
    m = problem.linear.in_features
    generator = torch.Generator().manual_seed(net.seed)
    Q = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    model = output_replaced(problem, reparam.rotate_features(problem.linear, Q))
    assert_same(kappas(problem, model, str(len(model) - 1)), kappas(problem, problem.model, problem.layer))


@given(net=nets(output_only=True, max_positions=0, loss=CLASSIFICATION), size=st.floats(-10, 10))
@settings(max_examples=50)
def test_adding_one_vector_to_all_rows(net: Net, size: float) -> None:
    problem = net.build()
    before = kappas(problem, problem.model, "output")
    m = problem.linear.in_features
    vector = size * torch.linspace(-1, 1, m, dtype=torch.float64)
    reparam.shift_rows(problem.linear, vector, problem.loss_fn)
    assert_same(kappas(problem, problem.model, "output"), before)


@given(
    net=nets(
        output_only=True,
        max_positions=0,
        min_batch=3,
        activations=["tanh", "gelu"],
        loss=losses(KNOWN_LOSSES),
    )
)
@settings(max_examples=50)
def test_rescaling_features_is_seen_unless_normalized_or_adaptive(net: Net) -> None:
    problem = net.build()
    m = problem.linear.in_features
    scales = torch.logspace(-1, 1, m, dtype=torch.float64)
    model = output_replaced(problem, reparam.rescale_features(problem.linear, scales))
    layer = str(len(model) - 1)

    for plain, rescaled in zip(
        kappas(problem, problem.model, problem.layer), kappas(problem, model, layer), strict=True
    ):
        assert abs(rescaled - plain) > DIFFERENT * abs(plain)
    for options in ({"adaptive": True}, {"normalize_features": True}):
        assert_same(
            kappas(problem, model, layer, **options),
            kappas(problem, problem.model, problem.layer, **options),
        )


def test_rotating_features_is_seen_by_the_adaptive_form() -> None:
    problem = example(Loss("cross_entropy"))
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    model = output_replaced(problem, reparam.rotate_features(problem.linear, Q))
    [before] = kappas(problem, problem.model, problem.layer, adaptive=True)
    [after] = kappas(problem, model, str(len(model) - 1), adaptive=True)
    assert abs(after - before) > DIFFERENT * abs(before)


def test_adding_one_vector_to_all_rows_is_seen_by_losses_without_softmax() -> None:
    problem = example(Loss("mse"))
    before = kappas(problem, problem.model, problem.layer)
    problem.linear.weight.data += 1.0
    for a, b in zip(kappas(problem, problem.model, problem.layer), before, strict=True):
        assert abs(a - b) > DIFFERENT * abs(b)


def test_the_trace_and_the_weight_norm_see_what_kappa_does_not() -> None:
    problem = example(Loss("cross_entropy"), activation="relu")
    before = relative_flatness(problem.model, problem.loss_fn, problem.data, layer=problem.layer)
    reparam.rescale_layer(problem.model[0], problem.model[1], problem.model[2], 10.0)
    after = relative_flatness(problem.model, problem.loss_fn, problem.data, layer=problem.layer)
    assert after.value == pytest.approx(before.value, rel=SAME)
    assert after.layerwise == pytest.approx(before.layerwise, rel=SAME)
    assert after.trace == pytest.approx(before.trace / 100, rel=SAME)
    assert after.weight_norm == pytest.approx(before.weight_norm * 10, rel=SAME)


@given(net=nets(max_positions=2), scale=st.floats(0.01, 100))
@settings(max_examples=50)
def test_kappa_is_linear_in_the_loss(net: Net, scale: float) -> None:
    problem = net.build()

    def scaled(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return scale * problem.loss_fn(outputs, targets)

    flat = relative_flatness(
        problem.model, problem.loss_fn, problem.data, layer=problem.layer, method="exact"
    )
    found = relative_flatness(problem.model, scaled, problem.data, layer=problem.layer, method="exact")
    assert relative_error(found.value, scale * flat.value) < SAME


def example(loss: Loss, activation: str = "tanh") -> Problem:
    return Net(
        seed=1,
        widths=(3, 4, 3),
        activation=activation,
        loss=loss,
        batch=5,
        positions=0,
        flatten=False,
        layer_index=1,
    ).build()
