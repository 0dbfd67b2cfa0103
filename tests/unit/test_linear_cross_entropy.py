"""Chunked cross-entropy + kappa against the definition, the dense formula and torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from device import DEVICE
from relflat import ConfigError, DataError, GraphError, LayerError, linear_cross_entropy_fam, reference
from unbounded import FAM

MODES = ("full", "frozen", "weights")


def problem(n=17, m=5, d=23, *, bias=True, dtype=torch.float64, ignored=()):
    phi = torch.randn(n, m, dtype=dtype, requires_grad=True)
    weight = torch.randn(d, m, dtype=dtype, requires_grad=True)
    b = torch.randn(d, dtype=dtype, requires_grad=True) if bias else None
    y = torch.randint(d, (n,))
    y[list(ignored)] = -100
    return phi, weight, b, y


def dense(phi, weight, bias, y, strength, gradient="full", smoothing=0.0, reduction="mean"):
    """The formula of the module's docstring with all logits at once, differentiated by autograd."""
    z = F.linear(phi, weight, bias)
    p = (z if gradient == "full" else z.detach()).softmax(-1)
    seen = phi.detach() if gradient == "weights" else phi
    kappa = seen.square().sum(-1) * (p @ weight.square() - (p @ weight).square()).sum(-1)
    kept = y != -100
    kappa = torch.where(kept, kappa, 0.0)
    task = F.cross_entropy(z, y, label_smoothing=smoothing, reduction=reduction)
    kappa = {"none": kappa, "sum": kappa.sum(), "mean": kappa.sum() / kept.sum()}[reduction]
    return task + strength * kappa, task, kappa


def gradients(total, inputs, along=None):
    return torch.autograd.grad(total, [x for x in inputs if x is not None and x.requires_grad], along)


def assert_same(found, expected, atol):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=atol)


@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(2, 11)),
    chunks=st.tuples(st.integers(1, 13), st.integers(1, 12)),
    gradient=st.sampled_from(MODES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    strength=st.sampled_from([0.0, 0.3, -2.0]),
    bias=st.booleans(),
    ignored=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_equals_dense_formula(sizes, chunks, gradient, reduction, smoothing, strength, bias, ignored, seed):
    torch.manual_seed(seed)
    n, m, d = sizes
    phi, weight, b, y = problem(n, m, d, bias=bias, ignored=range(min(ignored, n - 1)))
    expected = dense(phi, weight, b, y, strength, gradient, smoothing, reduction)
    found = linear_cross_entropy_fam(
        phi,
        weight,
        y,
        strength=strength,
        bias=b,
        reduction=reduction,
        label_smoothing=smoothing,
        gradient=gradient,
        chunk_tokens=chunks[0],
        chunk_classes=chunks[1],
    )
    along = torch.randn_like(expected[0])
    inputs = (phi, weight, b)
    assert_same(found, expected, 1e-9)
    assert_same(gradients(found[0], inputs, along), gradients(expected[0], inputs, along), 1e-9)


def test_kappa_and_gradients_equal_the_reference():
    phi, weight, b, y = problem(7, 3, 5)
    layer = nn.Linear(3, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(b)
    loss, W = reference.at_layer(layer, F.cross_entropy, phi, y, "weight")
    kappa = reference.kappa(loss, W)
    found = linear_cross_entropy_fam(
        phi, layer.weight, y, strength=1.0, bias=layer.bias, chunk_tokens=3, chunk_classes=2
    )
    assert abs(float(found.kappa) - float(kappa.detach())) < 1e-9
    inputs = (phi, layer.weight, layer.bias)
    assert_same(gradients(found.total, inputs), gradients(loss(W) + kappa, inputs), 1e-7)


@pytest.mark.parametrize("gradient", MODES)
def test_equals_fam(gradient):
    layer = nn.Linear(5, 23, dtype=torch.float64)
    phi, _, _, y = problem()
    criterion = FAM(nn.CrossEntropyLoss(), layer, "", strength=0.3, gradient=gradient)
    expected = criterion(layer(phi), y)
    found = linear_cross_entropy_fam(phi, layer.weight, y, strength=0.3, bias=layer.bias, gradient=gradient)
    inputs = (phi, layer.weight, layer.bias)
    assert_same([found.total], [expected], 1e-12)
    assert_same(gradients(found.total, inputs), gradients(expected, inputs), 1e-12)


def test_any_leading_shape():
    phi, weight, b, y = problem(12)
    flat = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b)
    tokens = linear_cross_entropy_fam(phi.view(2, 6, 5), weight, y.view(2, 6), strength=0.3, bias=b)
    assert_same(tokens, flat, 0)
    each = linear_cross_entropy_fam(phi.view(2, 6, 5), weight, y.view(2, 6), strength=0.3, reduction="none")
    assert [x.shape for x in each] == [(2, 6)] * 3


def test_only_what_is_asked_for_is_differentiated():
    phi, weight, b, y = problem()
    expected = gradients(dense(phi, weight, b, y, 0.3)[0], (phi, weight, b))
    for i, x in enumerate((phi, weight, b)):
        inputs = [p if p is x else p.detach() for p in (phi, weight, b)]
        found = linear_cross_entropy_fam(inputs[0], inputs[1], y, strength=0.3, bias=inputs[2])
        assert_same(gradients(found.total, [x]), [expected[i]], 1e-10)
        assert not found.task.requires_grad
        assert not found.kappa.requires_grad


def test_without_gradients():
    phi, weight, b, y = problem()
    with torch.no_grad():
        found = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b)
    assert not found.total.requires_grad
    assert_same(found, dense(phi, weight, b, y, 0.3), 1e-10)


def test_all_ignored_is_like_torch():
    phi, weight, b, y = problem(ignored=range(17))
    found = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b)
    assert bool(found.total.isnan())
    assert bool(F.cross_entropy(F.linear(phi, weight, b), y).isnan())
    assert all(not g.any() for g in gradients(found.total, (phi, weight, b)))
    assert float(linear_cross_entropy_fam(phi, weight, y, strength=0.3, reduction="sum").task) == 0


# -- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1e-4, 1e-7, 1e-10])
def test_certain_tokens_keep_their_relative_accuracy(missing):
    """In float32, where 1 - p has lost everything."""
    phi, weight, _, y = problem(bias=False)
    with torch.no_grad():
        phi *= (-torch.tensor(missing).log() / (phi @ weight.T).topk(2).values.diff().abs().min()).double()
    y = (phi @ weight.T).argmax(-1)
    exact = linear_cross_entropy_fam(phi, weight, y, strength=1.0)
    coarse = [x.detach().float().requires_grad_() for x in (phi, weight)]
    again = linear_cross_entropy_fam(*[x.double() for x in coarse], y, strength=1.0)
    found = linear_cross_entropy_fam(*coarse, y, strength=1.0)
    assert found.kappa.dtype == torch.float32
    torch.testing.assert_close(found.kappa.double(), again.kappa, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.task.double(), again.task, rtol=1e-3, atol=0)
    assert float(exact.kappa) > 0


def test_a_large_part_common_to_all_rows_does_not_matter():
    phi, weight, _, y = problem(bias=False, dtype=torch.float32)
    moved = (weight.detach() + 100 * torch.randn(5)).requires_grad_()
    found = linear_cross_entropy_fam(phi, moved, y, strength=1.0)
    expected = linear_cross_entropy_fam(phi.double(), moved.double(), y, strength=1.0)
    torch.testing.assert_close(found.kappa.double(), expected.kappa, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    phi, weight, b, y = problem(40, 16, 50, dtype=dtype)
    found = linear_cross_entropy_fam(phi, weight, y, strength=0.1, bias=b)
    wide = [x.detach().double().requires_grad_() for x in (phi, weight, b)]
    expected = dense(*wide, y, 0.1)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), expected[0], rtol=1e-5, atol=0)
    for a, e in zip(gradients(found.total, (phi, weight, b)), gradients(expected[0], wide), strict=True):
        assert a.dtype == dtype
        assert float((a.double() - e).norm() / e.norm()) < torch.finfo(dtype).eps


def test_autocast_does_not_reach_the_sums():
    phi, weight, b, y = problem(dtype=torch.float32)
    expected = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b)
    assert_same(found, expected, 0)
    mixed = linear_cross_entropy_fam(phi.bfloat16(), weight, y, strength=0.3, bias=b)
    assert abs(float(mixed.total.detach() / expected.total.detach()) - 1) < 1e-2


def test_scaled_loss_overflows_to_infinity_and_not_to_nan_or_silence():
    """What GradScaler needs to skip the step."""
    phi, weight, b, y = problem(dtype=torch.float16)
    found = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b)
    (grad,) = torch.autograd.grad(found.total * 2.0**40, [phi])
    assert bool(grad.isinf().any())


def test_never_holds_all_logits():
    """The largest tensor made has as many entries as the buffer, the weight or the features."""
    phi, weight, _, y = problem(64, 8, 512, bias=False, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy_fam(phi, weight, y, strength=1.0, chunk_tokens=8, chunk_classes=32).total.backward()
    assert largest == 8 * 512


# -- use -----------------------------------------------------------------------------------------------------


def test_training_lowers_both():
    phi, weight, b, y = problem(64, 8, 32, dtype=torch.float32)
    optimizer = torch.optim.SGD([weight, b], lr=0.5)
    seen = []
    for _ in range(30):
        loss = linear_cross_entropy_fam(phi.detach(), weight, y, strength=0.05, bias=b, chunk_tokens=16)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        seen.append(loss)
    assert seen[-1].task < seen[0].task
    assert seen[-1].kappa < seen[0].kappa


def test_backward_may_be_repeated():
    phi, weight, b, y = problem()
    total = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b).total
    (one,) = torch.autograd.grad(total, [weight], retain_graph=True)
    (two,) = torch.autograd.grad(2 * total, [weight], create_graph=True)
    assert_same([two], [2 * one], 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("again", range(3))
def test_second_derivatives_are_refused(reduction, again):
    """In any input, also where nothing that comes in depends on it."""
    phi, weight, b, y = problem()
    total = linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b, reduction=reduction).total.sum()
    (first,) = torch.autograd.grad(total, [weight], create_graph=True)
    with pytest.raises(GraphError, match="differentiated once"):
        torch.autograd.grad(first.square().sum(), [(phi, weight, b)[again]])
    with pytest.raises(GraphError, match="differentiated once"):
        (total + first.sum()).backward()


def test_kappa_of_a_hidden_layer_is_refused_not_wrong():
    """Beside a chunked output layer: the probes of FAM differentiate twice."""
    model, (_, weight, b, y) = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double(), problem()
    fam = FAM(None, model, "0", strength=0.1, curvature="hessian")
    loss = linear_cross_entropy_fam(model(torch.randn(17, 5).double()), weight, y, strength=0.0, bias=b).total
    with pytest.raises(GraphError, match="write the logits out"):
        (loss + fam.penalty(loss)).backward()


@pytest.mark.slow
def test_inside_a_compiled_step():
    phi, weight, b, y = problem(dtype=torch.float32)

    @torch.compile(backend="aot_eager")
    def step(x):
        return linear_cross_entropy_fam(x.tanh() * 2, weight, y, strength=0.3, bias=b).total

    expected = linear_cross_entropy_fam(phi.tanh() * 2, weight, y, strength=0.3, bias=b).total
    assert_same(gradients(step(phi), (phi, weight)), gradients(expected, (phi, weight)), 1e-6)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"reduction": "max"}, ConfigError, "reduction"),
        ({"gradient": "half"}, ConfigError, "frozen"),
        ({"label_smoothing": 1.5}, ConfigError, "label_smoothing"),
        ({"chunk_tokens": 0}, ConfigError, "chunk_tokens"),
        ({"chunk_classes": 0}, ConfigError, "chunk_classes"),
        ({"probes": 6, "step": 0}, ConfigError, "from 1 to 5"),
        ({"probes": 0, "step": 0}, ConfigError, "probes=0"),
        ({"probes": 2}, ConfigError, "step="),
        ({"bias": torch.zeros(4)}, LayerError, "bias"),
        ({"features": torch.zeros(17, 6)}, LayerError, "do not fit"),
        ({"weight": torch.zeros(23, 5, 1)}, LayerError, "do not fit"),
        ({"targets": torch.zeros(17)}, DataError, "class index"),
        ({"targets": torch.zeros(16, dtype=torch.long)}, DataError, "class index"),
        ({"targets": torch.full((17,), 23)}, DataError, "ignore_index"),
        ({"targets": torch.full((17,), -1)}, DataError, "ignore_index"),
    ],
)
def test_bad_input(change, error, says):
    phi, weight, b, y = problem()
    given = {"features": phi, "weight": weight, "targets": y, "bias": b, "strength": 0.1} | change
    with pytest.raises(error, match=says):
        linear_cross_entropy_fam(**given)


def test_features_that_overflow_in_half_precision_leave_the_weights_alone():
    """The task loss is not a number then, and GradScaler skips the step; the next one trains."""
    body, head = nn.Linear(5, 5), nn.Linear(5, 23)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), torch.amp.GradScaler(DEVICE.type, init_scale=16.0)
    x, y = torch.randn(17, 5), torch.randint(23, (17,))
    changed = []
    for size in (1e7, 1.0):
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = linear_cross_entropy_fam(
                body(x * size), head.weight, y, strength=0.3, bias=head.bias, probes=2, step=0
            )
        scaler.scale(loss.total).backward()
        scaler.step(optimizer)
        scaler.update()
        changed.append(not all(torch.equal(a, p) for a, p in zip(before, parameters, strict=True)))
        assert all(bool(p.isfinite().all()) for p in parameters)
    assert changed == [False, True]
