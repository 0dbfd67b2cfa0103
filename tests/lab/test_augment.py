import pytest
import torch

from relflat.lab.data.arrays import Arrays
from relflat.lab.data.augment import DRAWS, crop_flip, crop_flip_cutout, cutout, draws_for
from relflat.lab.data.batches import EpochOrder, training_loader

pictures = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6) + 1


def draws(*values):
    return torch.tensor([values] * len(pictures))


def test_middle_draws_leave_the_picture_as_it_is():
    assert torch.equal(crop_flip(pictures, draws(0.5, 0.5, 0.1, 0, 0)), pictures)


def test_crop_shifts_and_brings_in_zeros():
    shifted = crop_flip(pictures, draws(0.0, 0.99, 0.1, 0, 0), pad=2)
    assert torch.equal(shifted[:, :, 2:, :4], pictures[:, :, :4, 2:])
    assert not shifted[:, :, :2].any()
    assert not shifted[:, :, :, 4:].any()


def test_flip_mirrors_left_and_right():
    assert torch.equal(crop_flip(pictures, draws(0.5, 0.5, 0.9, 0, 0)), pictures.flip(3))


@pytest.mark.parametrize(("centre", "rows", "columns"), [((0.5, 0.5), (2, 4), (2, 4)), ((0.0, 0.99), (0, 1), (4, 6))])
def test_cutout_hides_a_square(centre, rows, columns):
    hidden = cutout(pictures, draws(0, 0, 0, *centre), side=2) == 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(hidden, expected.expand_as(hidden))


def test_both_do_both():
    one = draws(0.1, 0.8, 0.9, 0.3, 0.6)
    assert torch.equal(crop_flip_cutout(pictures, one), cutout(crop_flip(pictures, one), one))


def test_draws_follow_from_seed_and_epoch():
    assert draws_for(4, 1, 2).shape == (4, DRAWS)
    assert torch.equal(draws_for(4, 1, 2), draws_for(4, 1, 2))
    assert not torch.equal(draws_for(4, 1, 2), draws_for(4, 1, 3))
    assert not torch.equal(draws_for(4, 1, 2), draws_for(4, 2, 2))


def test_a_picture_is_changed_alike_whatever_the_batch_it_is_in():
    samples = Arrays(torch.rand(12, 3, 8, 8), torch.arange(12))

    def epoch(size):
        order = EpochOrder(12, size, seed=3)
        order.epoch = 1
        seen = list(training_loader(samples, order, crop_flip))
        inputs, targets = (torch.cat(part) for part in zip(*seen, strict=True))
        return inputs[targets.argsort()]

    assert torch.equal(epoch(3), epoch(6))
    assert not torch.equal(epoch(3), samples.inputs)
