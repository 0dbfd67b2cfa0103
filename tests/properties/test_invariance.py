"""What relative flatness is and is not invariant to (design notes, section 1)."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import KNOWN_LOSSES, Loss, Net, Problem, losses, nets, relative_error
from relflat import DataError, RelflatWarning, reference, relative_flatness, reparam
from relflat.estimate.radius import Noise
from relflat.rng import Rng
from unbounded import FAM

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
        values.append(reference.kappa(*reference.at_layer(model, problem.loss_fn, *problem.data, name)).item())
    return values


def assert_same(found: list[float], expected: list[float]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < SAME


def relu_nets(min_batch: int = 1) -> st.SearchStrategy[Net]:
    return nets(activations=["relu"], min_depth=2, min_batch=min_batch, max_positions=0, loss=CLASSIFICATION)


@given(net=relu_nets(), factor=factors)
@settings(max_examples=30)
def test_rescaling_a_layer_against_the_one_before(net: Net, factor: float) -> None:
    problem = net.build()
    for index in range(2, len(problem.model), 2):
        before = kappas(problem, problem.model, str(index))
        model = copy.deepcopy(problem.model)
        reparam.rescale_layer(model[index - 2], model[index - 1], model[index], factor)
        assert_same(kappas(problem, model, str(index)), before)


@given(net=relu_nets(), data=st.data())
@settings(max_examples=30)
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
@settings(max_examples=30)
def test_rotating_features(net: Net) -> None:
    problem = net.build()
    m = problem.linear.in_features
    generator = torch.Generator().manual_seed(net.seed)
    Q = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    model = output_replaced(problem, reparam.rotate_features(problem.linear, Q))
    assert_same(kappas(problem, model, str(len(model) - 1)), kappas(problem, problem.model, problem.layer))


@given(net=nets(output_only=True, max_positions=0, loss=CLASSIFICATION), size=st.floats(-10, 10))
@settings(max_examples=30)
def test_adding_one_vector_to_all_rows(net: Net, size: float) -> None:
    problem = net.build()
    before = kappas(problem, problem.model, "output")
    m = problem.linear.in_features
    vector = size * torch.linspace(-1, 1, m, dtype=torch.float64)
    reparam.shift_rows(problem.linear, vector, problem.loss_fn)
    assert_same(kappas(problem, problem.model, "output"), before)


@given(
    net=nets(output_only=True, max_positions=0, min_batch=3, activations=["tanh", "gelu"], loss=losses(KNOWN_LOSSES))
)
@settings(max_examples=30)
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
            kappas(problem, model, layer, **options), kappas(problem, problem.model, problem.layer, **options)
        )


@given(net=relu_nets(min_batch=2), factor=st.floats(1e-2, 1e2), data=st.data())
@settings(max_examples=30)
def test_normalized_kappa_does_not_see_the_scale_of_layers_or_of_dead_units(
    net: Net, factor: float, data: st.DataObject
) -> None:
    """A ReLU that never fires has no deviation to be divided by: it is left out, with its outgoing weights."""
    problem = net.build()
    options = {"normalize_features": True}
    for index in range(2, len(problem.model), 2):
        layer = "output" if index == len(problem.model) - 1 else str(index)
        before, weight = problem.model[index - 2], problem.model[index].weight
        dead = data.draw(st.integers(0, before.out_features - 1))
        with torch.no_grad():
            before.bias[dead] = -1e4
        expected = kappas(problem, problem.model, layer, **options)
        named = replace(problem, net=replace(net, layer_index=index // 2))
        assert_same(expected, [named.kappa_normalized().item()] * len(expected))
        model = copy.deepcopy(problem.model)
        reparam.rescale_layer(model[index - 2], model[index - 1], model[index], factor)
        assert_same(kappas(problem, model, layer, **options), expected)
        with torch.no_grad():
            model[index].weight[:, dead] = 1e3 * torch.randn_like(weight[:, dead])
            model[index - 2].weight[dead] *= factor
            model[index - 2].bias[dead] *= factor
        assert_same(kappas(problem, model, layer, **options), expected)


def test_normalized_kappa_of_a_constant_feature_is_that_of_a_bias() -> None:
    """By every way to kappa, and in training: a feature that is 0.3 throughout, and the same in the bias."""
    problem = example(Loss("cross_entropy"))
    with torch.no_grad():
        problem.model[0].weight[2], problem.model[0].bias[2] = 0.0, 0.3
    model = copy.deepcopy(problem.model)
    with torch.no_grad():
        model[2].bias += model[2].weight[:, 2] * math.tanh(0.3)
        model[2].weight[:, 2] = 0.0
    for options in ({"curvature": "hessian"}, {"curvature": "ggn"}, {"adaptive": True}):
        assert_same(
            kappas(problem, problem.model, "output", normalize_features=True, **options),
            kappas(problem, model, "output", normalize_features=True, **options),
        )
    moved = nn.Sequential(*model[:2], *reparam.normalize_features(model[2], model[:2](problem.inputs)))
    torch.testing.assert_close(moved(problem.inputs), problem.model(problem.inputs), rtol=1e-12, atol=1e-12)
    far = 1e3 * problem.inputs
    torch.testing.assert_close(moved(far), model(far), rtol=1e-12, atol=1e-12)
    assert_same(
        kappas(problem, moved, "3", normalize_features=True), kappas(problem, model, "2", normalize_features=True)
    )


@pytest.mark.parametrize("method", ["auto", "exact", "probe", "finite_difference"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_training_in_normalized_features_leaves_out_what_never_varies(activation: str, method: str) -> None:
    """One dead or constant feature: the penalty sees no more of its weight than of the bias."""
    problem = example(Loss("cross_entropy"), activation)
    with torch.no_grad():
        problem.model[0].weight[2] = 0.0
        problem.model[0].bias[2] = -0.3
    problem.model.train()
    found, constant = [], problem.model[1](torch.tensor(-0.3, dtype=torch.float64))
    for factor in (1.0, 1e6):
        weight = problem.model[2].weight
        with torch.no_grad():
            problem.model[2].bias += (1 - factor) * weight[:, 2] * constant
            weight[:, 2] *= factor
        curvature = "hessian" if method == "finite_difference" else "ggn"
        options = {"normalize_features": True, "method": method, "curvature": curvature, "seed": 0}
        with FAM(problem.loss_fn, problem.model, "2", strength=1.0, **options) as fam:
            outputs = problem.model(problem.inputs)
            penalty = fam(outputs, problem.targets) - problem.loss_fn(outputs, problem.targets)
        grads = torch.autograd.grad(penalty, list(problem.model.parameters()))
        assert all(bool(g.isfinite().all()) for g in grads)
        torch.testing.assert_close(grads[2][:, 2], constant * grads[3], rtol=1e-6, atol=1e-9)
        found.append(penalty.item())
    # the function is the same up to rounding of 1e6 * W
    assert found[1] == pytest.approx(found[0], rel=1e-3 if method == "finite_difference" else 1e-8)
    if method in ("auto", "exact"):
        expected = kappas(problem, problem.model.eval(), "2", normalize_features=True, curvature="ggn")[0]
        assert found[1] == pytest.approx(expected, rel=1e-8)


def test_a_batch_of_one_row_has_no_normalized_features() -> None:
    problem = example(Loss("cross_entropy"))
    row = (problem.inputs[:1], problem.targets[:1])
    with pytest.raises(DataError, match=r"hold 1 row of features of layer '2'.*at least two"):
        relative_flatness(problem.model, problem.loss_fn, row, layer="2", normalize_features=True)
    problem.model.train()
    with FAM(problem.loss_fn, problem.model, "2", strength=1.0, normalize_features=True) as fam:
        outputs = problem.model(row[0])
        with pytest.warns(RelflatWarning, match=r"'2' has a single row.*drop_last"):
            fam(outputs, row[1])
        assert fam.last["kappa"] == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_noise_in_normalized_features_leaves_out_what_never_varies(adaptive: bool) -> None:
    layer, x = nn.Linear(4, 2), torch.randn(50, 4)
    x[:, 1], x[:, 3] = 0.0, 0.9

    def change(x: Tensor, normalize: bool) -> Tensor:
        return Noise(0.1, Rng(0, 0), adaptive, normalize).change(layer, x)

    assert (change(x, True).std(0) > 1e-3).tolist() == [True, False, True, False]
    assert not change(x, True)[:, [1, 3]].any()
    assert change(x, False)[:, 3].std() > 1e-3
    with pytest.warns(RelflatWarning, match="Linear has a single row"):
        assert not change(x[:1], True).any()


def test_a_feature_far_from_zero_varies_as_far_as_its_dtype_can_tell() -> None:
    """In float64 a deviation of 1 around a mean of 1e7 is no rounding; in float32 it is all there is."""
    layer, phi = nn.Linear(4, 3).double(), torch.randn(30, 4, dtype=torch.float64)
    y = torch.arange(30) % 3
    with torch.no_grad():
        layer.bias -= 1e7 * layer.weight[:, 0]
    far = phi.clone()
    far[:, 0] += 1e7
    without = phi.clone()
    without[:, 0] = 0
    loss = nn.CrossEntropyLoss()
    found, less = (
        relative_flatness(nn.Sequential(layer), loss, (x, y), layer="0", normalize_features=True).value
        for x in (far, without)
    )
    assert found > 1e3 * less  # the mean square of a feature counts
    assert reparam.normalize_features(layer, far)[0](far).std(0, correction=0)[0] == pytest.approx(1, rel=1e-6)
    wide = far.float() + torch.randn(30, 1) * torch.tensor([1.0, 0, 0, 0])  # rounded to whole numbers
    assert reparam.normalize_features(layer.float(), wide)[0].scale[0] == 1


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
@settings(max_examples=30)
def test_kappa_is_linear_in_the_loss(net: Net, scale: float) -> None:
    problem = net.build()

    def scaled(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return scale * problem.loss_fn(outputs, targets)

    flat = relative_flatness(problem.model, problem.loss_fn, problem.data, layer=problem.layer, method="exact")
    found = relative_flatness(problem.model, scaled, problem.data, layer=problem.layer, method="exact")
    assert relative_error(found.value, scale * flat.value) < SAME


def example(loss: Loss, activation: str = "tanh") -> Problem:
    return Net(
        seed=1, widths=(3, 4, 3), activation=activation, loss=loss, batch=5, positions=0, flatten=False, layer_index=1
    ).build()
