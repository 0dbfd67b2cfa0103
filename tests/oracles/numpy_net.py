"""A one-hidden-layer tanh network with cross-entropy in plain Python arithmetic, and difference quotients.

No autograd and no torch: the arrays hold floats, or mpmath numbers of as many digits as wanted.
"""

from collections.abc import Callable
from itertools import product

import numpy as np

Weights = dict[str, np.ndarray]


def cross_entropy(weights: Weights, x: np.ndarray, y: list[int], exp: Callable, log: Callable) -> object:
    """Mean over samples of -log softmax(W2 tanh(W1 x + b1) + b2)[y]."""
    total = 0
    for sample, label in zip(x, y, strict=True):
        hidden = [_tanh(a, exp) for a in weights["W1"] @ sample + weights["b1"]]
        logits = weights["W2"] @ np.array(hidden) + weights["b2"]
        total = total + log(sum(exp(z) for z in logits)) - logits[label]
    return total / len(y)


def _tanh(a: object, exp: Callable) -> object:
    return (exp(a) - exp(-a)) / (exp(a) + exp(-a))


def second_derivatives(f: Callable[[np.ndarray], float], W: np.ndarray, h: float) -> np.ndarray:
    """All second derivatives of f at W, shape (d, m, d, m), by central stencils of fourth order."""
    first = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}  # f' = sum_k first[k] f(x + k h) / h
    second = {-2: -1 / 12, -1: 16 / 12, 0: -30 / 12, 1: 16 / 12, 2: -1 / 12}
    H = np.zeros(W.shape + W.shape)
    for a, b in product(np.ndindex(W.shape), repeat=2):
        if a == b:
            H[a + b] = sum(c * f(_moved(W, {a: k * h})) for k, c in second.items()) / h**2
        else:
            H[a + b] = (
                sum(first[k] * first[k_] * f(_moved(W, {a: k * h, b: k_ * h})) for k, k_ in product(first, first))
                / h**2
            )
    return H


def _moved(W: np.ndarray, steps: dict[tuple[int, ...], float]) -> np.ndarray:
    W = W.copy()
    for index, step in steps.items():
        W[index] = W[index] + step
    return W


def kappa_by_differences(f: Callable[[np.ndarray], object], W: np.ndarray, h: object) -> object:
    """Definition 3 with each second derivative a central difference quotient, for exact arithmetic."""
    d, m = W.shape
    total = 0
    for s, s_, t in product(range(d), range(d), range(m)):
        if s == s_:
            derivative = (f(_moved(W, {(s, t): h})) - 2 * f(W) + f(_moved(W, {(s, t): -h}))) / h**2
        else:
            corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
            derivative = sum(sign * f(_moved(W, {(s, t): k * h, (s_, t): k_ * h})) for k, k_, sign in corners) / (
                4 * h**2
            )
        total = total + (W[s] @ W[s_]) * derivative
    return total
