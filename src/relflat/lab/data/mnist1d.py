"""MNIST-1D: 4,000 + 1,000 synthetic signals of length 40, by the generator of its authors.

The generator is that of the package mnist1d 0.0.2.post1, Copyright 2020 Sam Greydanus, 2024 Sam Greydanus and Peter
Steinbach, licensed under the Apache License, Version 2.0 (http://www.apache.org/licenses/LICENSE-2.0, a copy is in
LICENSE). Changed here: only the default arguments are left, its draws come from a generator of their own, the times
of the signals are left out. The arrays are the same to the bit. Greydanus and Kobak (2020), arXiv 2011.14439.
"""

import numpy as np
from numpy.random import RandomState
from scipy.ndimage import gaussian_filter

SEED = 42
SAMPLES = 5000
LENGTH = 40
PADDING = 36, 60  # zeros appended, least and most
STRETCHED = 12 + 60  # points of a template between the two resamplings
TEMPLATES = np.array(  # of the ten digits
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)


def generate() -> tuple[np.ndarray, np.ndarray]:
    """Signals of shape (5000, 40) and their digits, shuffled."""
    random = RandomState(SEED)
    templates = TEMPLATES - TEMPLATES.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6.0  # signals start and end at 0
    labels = np.arange(10).repeat(SAMPLES // 10)
    signals = np.stack([transformed(templates[label], random) for label in labels])
    order = random.permutation(SAMPLES)
    signals, labels = signals[order], labels[order]
    return (signals - signals.mean()) / signals.std(), labels


def transformed(template: np.ndarray, random: RandomState) -> np.ndarray:
    """One signal: a template padded, stretched, scaled and translated, with noise and shear."""
    low, high = PADDING
    padded = np.concatenate([template + 1e-8, np.zeros(low + int(random.rand() * (high - low + 1)))])
    x = resampled(padded, STRETCHED)
    x *= 1 + 0.4 * (random.rand() - 0.5)
    shift = random.choice(48)
    x = np.concatenate([x[-shift:], x[:-shift]])
    mask = x != 0
    x = mask * x + (1 - mask) * gaussian_filter(0.25 * random.randn(STRETCHED), 2)
    x = x + 2e-2 * random.randn(STRETCHED)
    x = x - 0.75 * (random.rand() - 0.5) * np.linspace(-0.5, 0.5, STRETCHED)
    return resampled(x, LENGTH)


def resampled(x: np.ndarray, points: int) -> np.ndarray:
    """Linear interpolation at so many equally spaced points."""
    return np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(x)), x)
