import hashlib

import numpy as np
import torch

from relflat.lab.data import mnist1d, read
from relflat.lab.tasks.models import signal_cnn

# of the arrays that the package mnist1d 0.0.2.post1 makes by default
SHA256 = "b09ad3e22c854bc5a1948b85c373aab653ceb38c9170f5ed05b7d054e4160db9"


def test_network_fits_the_signals():
    assert signal_cnn()(torch.zeros(2, 1, 40)).shape == (2, 10)


def test_data_set_is_the_packages_own():
    before = np.random.get_state()
    raw = read("mnist1d")
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert raw.test is not None
    assert raw.pool.inputs.shape == (4000, 1, 40)
    assert raw.test.inputs.shape == (1000, 1, 40)
    digest = hashlib.sha256()
    for part in (raw.pool, raw.test):
        digest.update(part.inputs.numpy().tobytes())
        digest.update(part.targets.numpy().tobytes())
    assert digest.hexdigest() == SHA256


def test_signals_are_standardised_over_the_whole_set():
    signals, labels = mnist1d.generate()
    np.testing.assert_allclose([signals.mean(), signals.std()], [0, 1], atol=1e-12)
    assert np.bincount(labels).tolist() == [500] * 10
