"""Data sets and weights that tests fetch, by the code behind ``relflat data get``."""

import os
from pathlib import Path

import pytest

from relflat.errors import DataError
from relflat.lab.data.fetch import get


def have(*names: str) -> None:
    """Have these in the cache, or skip with the reason; RELFLAT_REQUIRE_DATA makes it fail instead."""
    for name in names:
        try:
            get(name)
        except DataError as error:
            if os.environ.get("RELFLAT_REQUIRE_DATA"):
                raise
            pytest.skip(f"{name} cannot be fetched here: {error}")


def fashion_mnist() -> None:
    """Have the real Fashion-MNIST."""
    have("fashion-mnist")


def kept(cache: Path) -> list[str]:
    """What is in a cache; a lock is kept for good."""
    return [entry.name for entry in cache.iterdir() if entry.suffix != ".lock"]
