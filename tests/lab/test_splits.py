import pytest
import torch

from fetched import fashion_mnist
from relflat.errors import ConfigError
from relflat.lab.data import Arrays, read
from relflat.lab.data.splits import redraw
from relflat.lab.tasks import TASKS


def digits(train_size=None, label_noise=0.0, seed=0):
    return TASKS["digits"].splits(train_size=train_size, label_noise=label_noise, seed=seed)


def rows(samples: Arrays) -> set[bytes]:
    return {row.numpy().tobytes() for row in samples.inputs.flatten(1)}


def test_digits_splits_are_disjoint_and_cover_everything():
    splits = digits()
    parts = [splits.train, splits.validation, splits.test()]
    assert [len(part) for part in parts] == [897, 400, 500]
    pool = read("digits").pool
    assert len({row.numpy().tobytes() for row in pool.inputs.flatten(1)}) == 1797  # no duplicates to confuse us
    assert len(set.union(*map(rows, parts))) == 1797


def test_the_cut_does_not_depend_on_the_seed_of_the_run():
    first, second = digits(seed=0), digits(seed=1)
    assert torch.equal(first.validation.targets, second.validation.targets)
    assert torch.equal(first.test().inputs, second.test().inputs)


def test_label_noise_touches_training_labels_only():
    clean, noisy = digits(), digits(label_noise=0.5)
    assert torch.equal(clean.train.inputs, noisy.train.inputs)
    assert torch.equal(clean.validation.targets, noisy.validation.targets)
    assert torch.equal(clean.test().targets, noisy.test().targets)
    share = (clean.train.targets != noisy.train.targets).double().mean().item()
    assert share == noisy.changed
    assert share == pytest.approx(0.45, abs=0.06)  # half redrawn, a tenth of those by chance as before


def test_redrawn_labels_are_uniform():
    zeros = Arrays(torch.zeros(20_000, 1), torch.zeros(20_000, dtype=torch.int64))
    drawn = redraw(zeros, 1.0, 10, torch.Generator().manual_seed(0)).targets
    assert torch.bincount(drawn, minlength=10).double() == pytest.approx(torch.full((10,), 2000.0), abs=200)


def test_the_seed_draws_subset_and_noise():
    first, again, other = (digits(100, 0.2, seed) for seed in (3, 3, 4))
    assert len(first.train) == 100
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.train.targets, again.train.targets)
    assert not torch.equal(first.train.inputs, other.train.inputs)


def test_inputs_are_standardised_by_the_training_split():
    splits = digits()
    assert splits.train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert splits.train.inputs.std().item() == pytest.approx(1, abs=1e-5)
    assert splits.validation.inputs.mean().item() != 0


@pytest.mark.parametrize("size", [0, 1, 898, -5])
def test_impossible_train_size_is_rejected(size):
    with pytest.raises(ConfigError, match=f"train_size={size} is not between 2 and 897"):
        digits(train_size=size)


@pytest.mark.data
def test_fashion_mnist_is_the_real_thing():
    fashion_mnist()
    raw = read("fashion-mnist")
    assert raw.pool.inputs.shape == (60_000, 1, 28, 28)
    assert raw.test is not None
    assert torch.bincount(raw.pool.targets).tolist() == [6000] * 10
    assert torch.bincount(raw.test.targets).tolist() == [1000] * 10
    assert raw.pool.inputs.mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert raw.pool.inputs.std().item() == pytest.approx(0.3530, abs=1e-4)
    splits = TASKS["fashion-mnist"].splits(train_size=None, label_noise=0.0, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test())) == (55_000, 5_000, 10_000)


def test_noise_needs_labels():
    measured = Arrays(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ConfigError, match=r"label_noise=0\.2 redraws class labels.*torch\.float32"):
        redraw(measured, 0.2, 2, torch.Generator())
