"""Numbers that JSON does not have."""

from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """Replace nan and infinities, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
