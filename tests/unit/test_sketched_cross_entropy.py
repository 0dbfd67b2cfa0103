"""``linear_cross_entropy_fam(probes=k)``: exact at k = m, unbiased below, with the error that is promised."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from relflat import linear_cross_entropy_fam
from relflat.vocabulary import function as linear_cross_entropy

MODES = ("full", "frozen", "weights")


def problem(n=17, m=6, d=23, dtype=torch.float64, ignored=0):
    phi, weight, b = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((n, m), (d, m), (d,)))
    y = torch.randint(d, (n,))
    y[:ignored] = -100
    return phi, weight, b, y


def both(phi, weight, b, y, along=None, **options):
    """Value, kappa and all gradients."""
    found = linear_cross_entropy_fam(phi, weight, y, bias=b, **options)
    inputs = [x for x in (phi, weight, b) if x is not None]
    return [found.total, found.kappa, *torch.autograd.grad(found.total, inputs, along)]


def assert_same(found, expected, atol):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.slow
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
def test_with_all_directions_it_is_exact(
    sizes, chunks, gradient, reduction, smoothing, strength, bias, ignored, seed
):
    torch.manual_seed(seed)
    n, m, d = sizes
    phi, weight, b, y = problem(n, m, d, ignored=min(ignored, n - 1))
    options = {"strength": strength, "gradient": gradient, "reduction": reduction, "label_smoothing": smoothing}
    options |= {"chunk_tokens": chunks[0], "chunk_classes": chunks[1]}
    along = torch.randn(n if reduction == "none" else (), dtype=torch.float64)
    given = (phi, weight, b if bias else None, y, along)
    assert_same(both(*given, **options, probes=m, step=seed), both(*given, **options), 1e-9)


@pytest.mark.slow
@given(
    gradient=st.sampled_from(MODES),
    smoothing=st.sampled_from([0.0, 0.1]),
    k=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_formula_of_the_sketch(gradient, smoothing, k, seed):
    """All logits at once, differentiated by autograd."""
    torch.manual_seed(seed)
    phi, weight, b, y = problem(ignored=2)
    g = linear_cross_entropy._directions(k, weight, linear_cross_entropy.Rng(seed, 3))
    torch.testing.assert_close(g.mT @ g, 6 / k * torch.eye(k, dtype=torch.float64))
    z, seen = F.linear(phi, weight, b)[2:], (weight - weight.mean(0)) @ g
    p = (z if gradient == "full" else z.detach()).softmax(-1)
    norm2 = (phi.detach() if gradient == "weights" else phi)[2:].square().sum(1)
    kappa = (norm2 * (p @ seen.square() - (p @ seen).square()).sum(1)).mean()
    total = F.cross_entropy(z, y[2:], label_smoothing=smoothing) + 0.3 * kappa
    d_phi, d_weight, d_bias = torch.autograd.grad(total, [phi, weight, b])
    d_weight = d_weight + 0.3 * less_noise(phi.detach()[2:], (weight - weight.mean(0)).detach(), p.detach(), g)
    options = {"strength": 0.3, "gradient": gradient, "label_smoothing": smoothing, "chunk_classes": 7}
    found = both(phi, weight, b, y, **options, probes=k, seed=seed, step=3, chunk_tokens=4)
    assert_same(found, [total, kappa, d_phi, d_weight, d_bias], 1e-10)


def less_noise(phi, weight, p, g):
    """What the Gram part of the gradient in W has instead of its sketch: equal in expectation, less noisy."""
    norm2, mu, random = phi.square().sum(1, keepdim=True), p @ weight, g @ g.mT
    beta, first = norm2 / len(phi), slice(0, 4)
    typical = (norm2 * mu)[first].sum(0) / norm2[first].sum()
    apart = F.one_hot(p.argmax(1), p.shape[1]) * (p > 0.5)
    others = p * (1 - apart) * beta
    exact = others.sum(0)[:, None] * (weight - typical)
    certain = p * apart * beta
    sketched = certain.sum(0)[:, None] * weight - certain.mT @ mu - others.mT @ (mu - typical)
    whole = (p * beta).sum(0)[:, None] * weight - (p * beta).mT @ mu
    return 2 * (exact + sketched @ random - whole @ random)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", MODES)
def test_unbiased(gradient):
    """Value and gradients, over 600 steps, along the exact gradients and random directions."""
    phi, weight, b, y = problem()
    options = {"strength": 0.3, "gradient": gradient}
    exact = both(phi, weight, b, y, **options)
    along = [*exact[2:], *map(torch.randn_like, exact[2:])]

    def numbers(found):
        return torch.stack([found[1], *((g * u).sum() for g, u in zip(found[2:] * 2, along, strict=True))])

    drawn = torch.stack([numbers(both(phi, weight, b, y, **options, probes=2, step=i)) for i in range(600)])
    stderr = drawn.std(0) / 600**0.5
    assert float(stderr[0]) > 0
    assert bool(((drawn.mean(0) - numbers(exact)).abs() <= 4 * stderr + 1e-12).all())


def trained_softmax():
    """Features and labels of digits, and a softmax layer trained on them."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    phi, weight = x / 16, torch.zeros(10, 64, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(phi @ weight.T, y).backward()
        optimizer.step()
    return phi, weight.detach(), y


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 16])
def test_relative_error_is_the_one_promised(k):
    phi, weight, y = trained_softmax()
    p, m = (phi @ weight.T).softmax(-1), 64
    around = weight - (p @ weight)[:, None]  # tokens, classes, features
    share = p * phi.square().sum(1, keepdim=True)
    covariance = torch.einsum("pc,pcs,pct->st", share, around, around)
    r = covariance.trace() ** 2 / covariance.square().sum()
    promised = math.sqrt(2 * (m - k) * (m / r - 1) / (k * (m - 1) * (m + 2)))
    exact = linear_cross_entropy_fam(phi, weight, y, strength=0.0).kappa
    drawn = torch.stack(
        [linear_cross_entropy_fam(phi, weight, y, strength=0.0, probes=k, step=i).kappa for i in range(400)]
    )
    error = float((drawn / exact - 1).square().mean().sqrt())
    assert error == pytest.approx(promised, rel=0.12)  # 400 draws know it to 4 %
    assert error < math.sqrt(2 / k)


def test_directions_depend_on_seed_step_and_rank_alone(monkeypatch):
    phi, weight, b, y = problem()

    def kappa(**options):
        return float(linear_cross_entropy_fam(phi, weight, y, strength=0.3, bias=b, probes=2, **options).kappa)

    state = torch.get_rng_state()
    first = kappa(step=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(9)
    assert kappa(step=5) == first
    others = {kappa(step=6), kappa(step=5, seed=1)}
    monkeypatch.setattr("relflat.rng._rank", lambda: 1)
    assert len({first, *others, kappa(step=5)}) == 4


@pytest.mark.parametrize("missing", [1e-4, 1e-7, 1e-10])
def test_certain_tokens_keep_their_relative_accuracy(missing, monkeypatch):
    """In float32: value and gradients, where 1 - p has lost everything."""
    g = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0] * 3**0.5
    monkeypatch.setattr(linear_cross_entropy, "_directions", lambda k, weight, rng: g.to(weight.dtype))
    phi, weight, _, _ = problem()
    with torch.no_grad():
        phi *= -math.log(missing) / (phi @ weight.T).topk(2).values.diff().abs().min()
    y = (phi @ weight.T).argmax(-1)
    coarse = [x.detach().float().requires_grad_() for x in (phi, weight)]
    fine = [x.detach().double().requires_grad_() for x in coarse]
    found, expected = (both(*x, None, y, strength=1.0, probes=2, step=0) for x in (coarse, fine))
    for a, e in zip(found, expected, strict=True):
        assert float((a.double() - e).norm() / e.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    phi, weight, b, y = problem(40, 16, 50, dtype=dtype)
    found = both(phi, weight, b, y, strength=0.1, probes=4, step=1)
    wide = [x.detach().float().requires_grad_() for x in (phi, weight, b)]
    expected = both(*wide, y, strength=0.1, probes=4, step=1)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for a, e in zip(found[2:], expected[2:], strict=True):
        assert a.dtype == dtype
        assert float((a.float() - e).norm() / e.norm()) < torch.finfo(dtype).eps


def test_training_on_sketches_lowers_the_exact_value():
    phi, weight, b, y = problem(64, 8, 32, dtype=torch.float32)
    before = linear_cross_entropy_fam(phi, weight, y, strength=0.05, bias=b).total.detach()
    optimizer = torch.optim.SGD([weight, b], lr=0.5)
    for step in range(30):
        optimizer.zero_grad()
        loss = linear_cross_entropy_fam(phi.detach(), weight, y, strength=0.05, bias=b, probes=1, step=step)
        loss.total.backward()
        optimizer.step()
    assert float(linear_cross_entropy_fam(phi, weight, y, strength=0.05, bias=b).total) < 0.7 * float(before)
