"""The Triton kernels do what the PyTorch functions do: on a GPU, or in Triton's interpreter on the CPU.

Without a GPU they run where ``triton`` is installed beside CPU torch, in a process of its own, since the interpreter
is chosen when the kernels are defined: ``TRITON_INTERPRET=1 python -m pytest tests/unit/test_vocabulary_triton.py``.
"""

import importlib.util
import os

import pytest
import torch

from relflat import linear_cross_entropy_fam
from relflat.vocabulary import blocks as vocabulary_blocks

GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (the pip package, or a CUDA build of torch)", allow_module_level=True)
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from relflat.vocabulary import triton as vocabulary_triton  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
SIZES = [(1, 1), (3, 7), (5, 64), (4, 2049), (2, 5000)]


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def both(name, *args):
    """What a function does to its arguments in PyTorch, and as a kernel."""
    found = []
    for module in (vocabulary_blocks, vocabulary_triton):
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        getattr(module, name)(*own)
        found.append([a for a in own if isinstance(a, torch.Tensor)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("p", "c"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_raise_top(p, c, bias):
    """From nothing, and from an earlier block that has the largest for some tokens only."""
    k = torch.randint(9, (p, 1), device=DEVICE)
    for top in (torch.full((p, 1), -torch.inf, device=DEVICE), 2 + randn(p, 1)):
        both("raise_top", randn(p, c), randn(c) if bias else None, 10, top, k)


@pytest.mark.parametrize(("p", "c"), SIZES)
def test_exponentials(p, c):
    """With the most likely class in this block, before it, and behind it."""
    z = randn(p, c)
    top = z.amax(1, keepdim=True) + torch.rand(p, 1, device=DEVICE)
    for k in (z.argmax(1, keepdim=True), torch.full((p, 1), -4, device=DEVICE), torch.full((p, 1), c, device=DEVICE)):
        both("exponentials", z, top, k, randn(c).abs(), randn(p, 1).abs(), randn(p, 1).abs())


@pytest.mark.parametrize(("p", "c"), SIZES)
def test_curve(p, c):
    args = [randn(p, c).exp(), randn(p, 6), randn(c, 6), randn(c), randn(p, 1), randn(p, 1)]
    both("curve", *args, torch.empty(p, c, device=DEVICE).fill_(torch.nan) if GPU else torch.zeros(p, c))


@pytest.mark.parametrize("gradient", ["full", "frozen", "weights"])
@pytest.mark.parametrize("probes", [None, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_the_whole_function(gradient, probes, smoothing, bias, monkeypatch):
    """Values and gradients with kernels equal those without, and float64 without."""
    phi, weight, b = randn(11, 8), randn(37, 8), randn(37)
    y = torch.randint(37, (11,), device=DEVICE)
    y[2] = -100
    options = {"strength": 0.3, "gradient": gradient, "label_smoothing": smoothing, "chunk_tokens": 4, "step": 0}
    calls = []

    def run(module, dtype):
        count = lambda *args: calls.append(module.__name__) or module.curve(*args)
        kernels = type("Kernels", (), {n: staticmethod(getattr(module, n)) for n in ("raise_top", "exponentials")})
        kernels.curve = staticmethod(count)
        monkeypatch.setattr(vocabulary_blocks, "kernels_for", lambda x: kernels)
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (phi, weight, *([b] if bias else []))]
        given = {"bias": inputs[2]} if bias else {}
        g = torch.linalg.qr(torch.ones(8, 3, device=DEVICE).tril())[0] * (8 / 3) ** 0.5
        monkeypatch.setattr("relflat.vocabulary.function._directions", lambda k, w, rng: g.to(w.dtype))
        found = linear_cross_entropy_fam(*inputs[:2], y, **given, **options, probes=probes, chunk_classes=16)
        return [found.total, found.kappa, *torch.autograd.grad(found.total, inputs)]

    found = run(vocabulary_triton, torch.float32)
    assert bool(calls) == (gradient == "full")
    for a, b32, e in zip(
        found, run(vocabulary_blocks, torch.float32), run(vocabulary_blocks, torch.float64), strict=True
    ):
        torch.testing.assert_close(a, b32, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not GPU, reason="no GPU: which kernels are chosen for CUDA tensors cannot be seen")
def test_kernels_are_chosen_on_the_gpu():
    assert vocabulary_blocks.kernels_for(randn(1)) is vocabulary_triton
    assert vocabulary_blocks.kernels_for(randn(1).double()) is vocabulary_blocks
    assert vocabulary_blocks.kernels_for(torch.zeros(1)) is vocabulary_blocks
