"""The fast paths against the reference, on random nets: values, gradients in every parameter, batches."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import ACTIVATIONS, KNOWN_LOSSES, UNKNOWN_LOSSES, Loss, Net, Problem, losses, nets, relative_error
from relflat import Flatness, reference, relative_flatness
from unbounded import FAM

VALUE, GRADIENT = 1e-9, 1e-7
COPIES = 8
STRENGTH = 0.7
REDUCIBLE = ("cross_entropy", "cross_entropy_probabilities", "bce", "mse", "huber", "poisson")


def measured(problem: Problem, **options: object) -> Flatness:
    return relative_flatness(problem.model, problem.loss_fn, problem.data, layer=problem.layer, **options)


def exact_methods(problem: Problem) -> list[str]:
    return ["auto", "exact", "closed_form"] if problem.loss_has_a_closed_form else ["exact"]


# Values


@given(net=nets())
@settings(max_examples=100)
def test_values(net: Net) -> None:
    problem = net.build()
    expected = problem.kappa().item()
    for method in exact_methods(problem):
        flat = measured(problem, method=method)
        assert relative_error(flat.value, expected) < VALUE, method
        assert flat.stderr == 0, method


@given(net=nets())
@settings(max_examples=100)
def test_gauss_newton_values(net: Net) -> None:
    problem = net.build()
    expected = problem.kappa("ggn")
    for method in exact_methods(problem):
        flat = measured(problem, method=method, curvature="ggn")
        assert relative_error(flat.value, expected) < VALUE, method
        assert flat.curvature == "ggn"


@given(net=nets())
@settings(max_examples=100)
def test_what_is_reported_beside_kappa(net: Net) -> None:
    problem = net.build()
    loss, W = problem.at_layer()
    flat = measured(problem, method=exact_methods(problem)[-1])
    assert relative_error(flat.loss, loss(W)) < VALUE
    assert relative_error(flat.weight_norm, W.norm()) < VALUE
    assert relative_error(flat.layerwise, flat.weight_norm**2 * flat.trace) < VALUE
    allowed = VALUE * max(1, abs(flat.trace)) + 4 * flat.trace_stderr
    assert abs(flat.trace - reference.trace(loss, W).item()) <= allowed


@given(net=nets())
@settings(max_examples=100)
def test_samples_are_counted_as_they_come_in_the_data(net: Net) -> None:
    """(N, T, m) inputs are N samples, whatever shape the model gives its outputs."""
    problem = net.build()
    flat = measured(problem, method=exact_methods(problem)[-1])
    assert flat.samples == net.batch
    assert relative_error(flat.feature_norm2, (problem.features() ** 2).sum() / net.batch) < VALUE


@given(net=nets(loss=losses(("cross_entropy_probabilities", "F.cross_entropy"))))
@settings(max_examples=50)
def test_confidence_is_the_mean_largest_probability(net: Net) -> None:
    problem = net.build()
    outputs = problem.model(problem.inputs)
    expected = outputs.softmax(1).amax(1).mean()
    for method in exact_methods(problem):
        assert relative_error(measured(problem, method=method).confidence, expected) < VALUE


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@given(net=nets())
@settings(max_examples=50)
def test_adaptive_values(curvature: str, net: Net) -> None:
    problem = net.build()
    expected = problem.kappa_adaptive(curvature)
    for method in exact_methods(problem):
        flat = measured(problem, method=method, curvature=curvature, adaptive=True)
        assert relative_error(flat.value, expected) < VALUE, method


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@given(net=nets(min_batch=2))
@settings(max_examples=50)
def test_values_in_normalized_features(curvature: str, net: Net) -> None:
    problem = net.build()
    expected = problem.kappa_normalized(curvature)
    for method in exact_methods(problem):
        flat = measured(problem, method=method, curvature=curvature, normalize_features=True)
        assert relative_error(flat.value, expected) < VALUE, method


@given(net=nets(loss=losses((*REDUCIBLE,))))
@settings(max_examples=50)
def test_an_unreduced_loss_is_taken_as_a_mean(net: Net) -> None:
    problem = net.build()
    unreduced = copy.copy(problem.loss_fn)
    unreduced.reduction = "none"

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return unreduced(outputs, targets).mean()

    expected = reference.kappa(*replace(problem, loss_fn=mean).at_layer())
    for method in exact_methods(problem):
        flat = measured(replace(problem, loss_fn=unreduced), method=method)
        assert relative_error(flat.value, expected) < VALUE, method


@given(net=nets(activations=["tanh", "gelu", "softplus"], loss=losses((*KNOWN_LOSSES, "poisson"))))
@settings(max_examples=25)
def test_finite_differences_come_close(net: Net) -> None:
    problem = net.build()
    expected = problem.kappa().item()
    flat = measured(problem, method="finite_difference", probes=50)
    assert abs(flat.value - expected) <= 4 * flat.stderr + 1e-4 * max(1, abs(expected))


class InTurn(nn.Module):
    """One square layer called on its own outputs, and an output layer."""

    def __init__(self, m: int, d: int) -> None:
        super().__init__()
        self.layer, self.output = nn.Linear(m, m).double(), nn.Linear(m, d).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class SideBySide(InTurn):
    """One layer called on two inputs that do not depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.layer(x)) * torch.tanh(self.layer(1 - x)))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", [InTurn, SideBySide])
@given(seed=st.integers(0, 1000), m=st.integers(2, 4), d=st.integers(2, 4), batch=st.integers(1, 5))
@settings(max_examples=25)
def test_a_layer_called_twice_counts_with_all_its_calls(
    kind: type[InTurn], curvature: str, seed: int, m: int, d: int, batch: int
) -> None:
    torch.manual_seed(seed)
    model, loss_fn = kind(m, d), nn.CrossEntropyLoss()
    x, y = torch.randn(batch, m, dtype=torch.float64), torch.randint(d, (batch,))
    loss, W = reference.at_layer(model, loss_fn, x, y, "layer")
    if curvature == "hessian":
        kappa = reference.kappa(loss, W)
    else:
        outputs, _ = reference.outputs_at_layer(model, x, "layer")
        kappa = reference.kappa_ggn(outputs, lambda z: loss_fn(z, y), W)
    flat = relative_flatness(model, loss_fn, (x, y), layer="layer", method="exact", curvature=curvature)
    assert relative_error(flat.value, kappa) < VALUE

    expected = torch.autograd.grad(loss_fn(model(x), y) + STRENGTH * kappa, list(model.parameters()))
    with FAM(loss_fn, model, "layer", strength=STRENGTH, method="exact", curvature=curvature) as fam:
        found = torch.autograd.grad(fam(model(x), y), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < GRADIENT


# Batches


@given(net=nets(loss=losses(KNOWN_LOSSES), min_batch=2), data=st.data())
@settings(max_examples=60)
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
            assert flat.stderr == 0


@pytest.mark.parametrize("method", ["closed_form", "exact"])
@pytest.mark.parametrize("positions", [0, 2])
def test_a_batch_whose_targets_are_all_ignored_adds_nothing(method: str, positions: int) -> None:
    """Alone its mean is 0 / 0, but the mean over all data is defined."""
    net = Net(
        seed=7,
        widths=(3, 4, 3),
        activation="tanh",
        loss=Loss("cross_entropy", weighted=True, ignore_index=-100),
        batch=4,
        positions=positions,
        flatten=True,
        layer_index=1,
    )
    problem = net.build()
    problem.targets[: len(problem.targets) // 2] = -100
    flat = relative_flatness(problem.model, problem.loss_fn, problem.cut([2, 2]), layer=problem.layer, method=method)
    assert relative_error(flat.value, problem.kappa()) < VALUE
    assert relative_error(flat.loss, problem.task_loss()) < VALUE


@given(net=nets(loss=losses(UNKNOWN_LOSSES), min_batch=4), last=st.integers(1, 2))
@settings(max_examples=50)
def test_values_of_losses_nothing_is_known_about_do_not_either(net: Net, last: int) -> None:
    """The last batch may be a single sample, as it happens with any loader."""
    problem = net.build()
    batches = problem.cut([net.batch - last, last])
    flat = relative_flatness(problem.model, problem.loss_fn, batches, layer=problem.layer, method="exact")
    assert relative_error(flat.value, problem.kappa()) < VALUE


@given(net=nets(loss=losses(("huber", "smooth_l1", "poisson")), min_batch=2))
@settings(max_examples=30)
def test_losses_that_name_their_reduction_may_come_in_batches_of_one(net: Net) -> None:
    problem = net.build()
    batches = problem.cut([1] * net.batch)
    flat = relative_flatness(problem.model, problem.loss_fn, batches, layer=problem.layer, method="exact")
    assert relative_error(flat.value, problem.kappa()) < VALUE


# Probes


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("form", ["kappa", "kappa_adaptive", "kappa_normalized"])
def test_probe_means_lie_within_four_standard_errors(curvature: str, form: str) -> None:
    """And the standard errors are honest: over many nets the deviations measured in them are of size one.

    400 directions a sample, for one probe is a product of two random numbers with heavy tails: where one sample makes
    up all of kappa, 100 are too few for four standard errors to mean what they mean for a Gaussian. Every sample is
    there ``COPIES`` times, each with directions of its own, so that so many fewer products make them.
    """
    options = {"kappa": {}, "kappa_adaptive": {"adaptive": True}, "kappa_normalized": {"normalize_features": True}}[
        form
    ]
    deviations: list[float] = []

    @given(
        net=nets(
            loss=losses(("cross_entropy", "bce", "mse", "huber", "poisson")),
            min_depth=2,
            min_batch=2,
            activations=[*ACTIVATIONS],
        )
    )
    @settings(max_examples=25)
    def check(net: Net) -> None:
        problem = net.build()
        inputs, targets = (torch.cat([t] * COPIES) for t in problem.data)
        problem = replace(problem, inputs=inputs, targets=targets)
        expected = getattr(problem, form)(curvature).item()
        probes = 400 // COPIES
        flat = measured(problem, method="probe", curvature=curvature, probes=probes, seed=net.seed, **options)
        deviation = flat.value - expected
        assert abs(deviation) <= 4 * flat.stderr + VALUE * max(1, abs(expected))
        if flat.stderr > VALUE:
            deviations.append(deviation / flat.stderr)

    check()
    assert len(deviations) > 15
    root_mean_square = math.sqrt(sum(z**2 for z in deviations) / len(deviations))
    assert 0.55 < root_mean_square < 1.5  # the 99.9 % range of chi(25) / 5 for a right standard error


# Gradients


def gradients(loss: Tensor, problem: Problem) -> dict[str, Tensor]:
    """The gradient in every parameter, zero where there is none."""
    names, parameters = zip(*problem.model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def check_fam(
    problem: Problem, kappa: Tensor, layer: object = None, methods: Sequence[str] = ("exact",), **options: object
) -> None:
    """One training step's value and gradients, by each method, are those of the task loss plus strength * kappa."""
    task, penalty = problem.task_loss(), STRENGTH * kappa
    expected = gradients(task + penalty, problem)
    problem.model.train()
    for method in methods:
        options |= {"strength": STRENGTH, "method": method}
        with FAM(problem.loss_fn, problem.model, layer or problem.layer, **options) as fam:
            loss = fam(problem.model(problem.inputs), problem.targets)
            found = gradients(loss, problem)
            last = dict(fam.last)
        assert relative_error(last["task"], task) < VALUE, method
        assert relative_error(last["penalty"], penalty) < VALUE, method
        assert relative_error(last["total"], task + penalty) < VALUE, method
        assert relative_error(loss, task + penalty) < VALUE, method
        for name, grad in expected.items():
            assert relative_error(found[name], grad) < GRADIENT, (method, name)


@given(net=nets())
@settings(max_examples=100)
def test_full_gradients(net: Net) -> None:
    problem = net.build()
    check_fam(problem, problem.kappa(), methods=exact_methods(problem), gradient="full", curvature="hessian")


@given(net=nets())
@settings(max_examples=100)
def test_full_gradients_of_gauss_newton(net: Net) -> None:
    problem = net.build()
    check_fam(problem, problem.kappa("ggn"), gradient="full", curvature="ggn")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@given(net=nets())
@settings(max_examples=50)
def test_frozen_gradients(curvature: str, net: Net) -> None:
    problem = net.build()
    kappa, methods = problem.kappa_frozen(curvature), exact_methods(problem)
    check_fam(problem, kappa, methods=methods, gradient="frozen", curvature=curvature)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@given(net=nets())
@settings(max_examples=50)
def test_weights_gradients(curvature: str, net: Net) -> None:
    problem = net.build()
    kappa, methods = problem.kappa_weights(curvature), exact_methods(problem)
    check_fam(problem, kappa, methods=methods, gradient="weights", curvature=curvature)


@given(net=nets())
@settings(max_examples=50)
def test_adaptive_gradients(net: Net) -> None:
    problem = net.build()
    options = {"methods": exact_methods(problem), "gradient": "full", "curvature": "hessian", "adaptive": True}
    check_fam(problem, problem.kappa_adaptive(), **options)


@pytest.mark.parametrize("gradient", ["full", "frozen", "weights"])
@given(net=nets(min_depth=2))
@settings(max_examples=30)
def test_the_kappas_of_several_layers_are_added(gradient: str, net: Net) -> None:
    problem = net.build()
    layers = [replace(net, layer_index=i) for i in range(len(net.widths) - 1)]

    kappa = {"full": Problem.kappa, "frozen": Problem.kappa_frozen, "weights": Problem.kappa_weights}[gradient]
    kappas = [kappa(replace(problem, net=one)) for one in layers]
    names = [str(2 * i) for i in range(len(layers))]
    check_fam(problem, sum(kappas), layer=names, gradient=gradient, curvature="hessian")


@given(net=nets(min_batch=2))
@settings(max_examples=50)
def test_penalty_in_normalized_features(net: Net) -> None:
    problem = net.build()
    expected = problem.kappa_normalized()
    problem.model.train()
    options = {"normalize_features": True, "curvature": "hessian", "method": "exact"}
    with FAM(problem.loss_fn, problem.model, problem.layer, strength=STRENGTH, **options) as fam:
        fam(problem.model(problem.inputs), problem.targets)
        assert relative_error(fam.last["penalty"], STRENGTH * expected) < VALUE


@given(net=nets(), scale=st.sampled_from([0.25, 1.0, 3.0]))
@settings(max_examples=50)
def test_penalty_of_a_loss_made_elsewhere(net: Net, scale: float) -> None:
    """kappa(c L) = c kappa(L): what a framework multiplies the loss by carries over, in every gradient."""
    problem = net.build()
    kappa = problem.kappa()
    expected = gradients(scale * (problem.task_loss() + STRENGTH * kappa), problem)
    problem.model.train()
    with FAM(
        problem.loss_fn, problem.model, problem.layer, strength=STRENGTH, curvature="hessian", method="exact"
    ) as fam:
        loss = scale * problem.task_loss()
        penalty = fam.penalty(loss)
        found = gradients(loss + penalty, problem)
    assert relative_error(penalty, scale * STRENGTH * kappa) < VALUE
    for name, grad in expected.items():
        assert relative_error(found[name], grad) < GRADIENT, name


@pytest.mark.parametrize("gradient", ["full", "frozen", "weights"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(("activation", "kind", "positions"), [("tanh", "cross_entropy", 0), ("gelu", "bce", 2)])
def test_probe_gradients_are_unbiased(
    gradient: str, curvature: str, activation: str, kind: str, positions: int
) -> None:
    """Over many seeds, the penalty and its gradient along the expected one have the right means.

    Each copy of a sample has directions of its own: eight of them average as many as eight seeds do.
    """
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
    kappa = {"full": problem.kappa, "frozen": problem.kappa_frozen, "weights": problem.kappa_weights}[gradient](
        curvature
    )
    problem.model.train()
    task = gradients(problem.task_loss(), problem)
    expected = gradients(STRENGTH * kappa, problem)
    reached = [name for name, grad in expected.items() if grad.abs().max() > 0]

    samples: dict[str, list[float]] = {name: [] for name in ["penalty", *reached]}
    inputs, targets = (torch.cat([t] * COPIES) for t in problem.data)
    for seed in range(200 // COPIES):
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
            loss = fam(problem.model(inputs), targets)
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
