"""A wrong name gets an answer that says which name was probably meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from relflat.errors import ConfigError

T = TypeVar("T")


def unknown(kind: str, value: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not among the known ones; ``kind`` says what it stands for, e.g. ``"task"``."""
    names = sorted(known)
    close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ConfigError(f"Unknown {kind} {value!r}{hint} Known: {', '.join(names)}.")


def look_up(kind: str, value: str, table: Mapping[str, T]) -> T:
    """Return ``table[value]``, or raise an error that names the nearest key."""
    if value not in table:
        raise unknown(kind, value, table)
    return table[value]


def names_in(text: str) -> list[str]:
    """One name, or several with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()] or [text]
