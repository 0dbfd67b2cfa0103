"""Fixtures of the lab's tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relflat.errors import DataError
from relflat.lab.config import RunConfig, make
from relflat.lab.fetch import get


@pytest.fixture
def config() -> Callable[..., RunConfig]:
    """Build a short run on digits; any value can be changed."""

    def build(**values: Any) -> RunConfig:
        short = {"task": "digits", "epochs": 3, "train_size": 200, "label_noise": 0.2}
        return make({**short, **values})

    return build


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The real data set, fetched by the code behind ``relflat data get``."""
    try:
        return get("fashion-mnist")
    except DataError as error:
        if os.environ.get("RELFLAT_REQUIRE_DATA"):
            raise
        pytest.skip(f"Fashion-MNIST cannot be fetched here: {error}")
