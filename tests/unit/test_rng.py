"""Streams are functions of seed and step, and differ wherever those do."""

import itertools

import torch

from relflat.rng import Rng

LIKE = torch.zeros((), dtype=torch.float64)


def draw(seed: int, step: int) -> torch.Tensor:
    return Rng(seed, step).signs((64,), LIKE)


def test_streams_differ_in_every_bit_of_seed_and_step() -> None:
    steps = [0, 1, 2, 1 << 31, 1 << 32, 3 << 32, 1 << 40, -1, -2]
    for a, b in itertools.combinations(steps, 2):
        assert not torch.equal(draw(0, a), draw(0, b)), (a, b)
        assert not torch.equal(draw(a, 0), draw(b, 0)), (a, b)


def test_the_same_seed_and_step_draw_the_same() -> None:
    assert torch.equal(draw(3, 4), draw(3, 4))
    assert not torch.equal(draw(3, 4), draw(4, 3))


def test_signs_are_balanced() -> None:
    signs = Rng(0, 0).signs((100_000,), LIKE)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.02
