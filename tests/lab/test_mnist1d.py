import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from fetched import have
from relflat.errors import DataError
from relflat.lab.data import fetch, mnist1d
from relflat.lab.data.sources import SOURCES


def test_damaged_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    (fetch.home(SOURCES["mnist1d"]) / "mnist1d").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot be run.*get 'mnist1d' again"):
        mnist1d.read()


def test_network_fits_the_signals():
    assert mnist1d.signal_cnn()(torch.zeros(2, 1, 40)).shape == (2, 10)


@pytest.mark.data
def test_data_set_is_the_packages_own(monkeypatch):
    """The package imported as it is, only its unused imports replaced, makes the same signals."""
    have("mnist1d")
    before = np.random.get_state()
    raw = mnist1d.read()
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert raw.test is not None
    assert raw.pool.inputs.shape == (4000, 1, 40)
    assert raw.test.inputs.shape == (1000, 1, 40)

    for name in ("requests", "matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.syspath_prepend(fetch.home(SOURCES["mnist1d"]))
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    np.random.set_state(before)
    for name in [name for name in sys.modules if name.split(".")[0] == "mnist1d"]:
        del sys.modules[name]
    for part, end in ((raw.pool, ""), (raw.test, "_test")):
        assert np.array_equal(part.inputs[:, 0].numpy(), made[f"x{end}"].astype(np.float32))
        assert np.array_equal(part.targets.numpy(), made[f"y{end}"])
