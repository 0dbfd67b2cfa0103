"""Data sets that tests fetch, by the code behind ``relflat data get``."""

import os

import pytest

from relflat.errors import DataError
from relflat.lab.fetch import get


def fashion_mnist() -> None:
    """Have the real Fashion-MNIST in the cache, or skip with the reason; RELFLAT_REQUIRE_DATA makes it fail."""
    try:
        get("fashion-mnist")
    except DataError as error:
        if os.environ.get("RELFLAT_REQUIRE_DATA"):
            raise
        pytest.skip(f"Fashion-MNIST cannot be fetched here: {error}")
