"""Fenced code blocks of a Markdown file, and what was printed beneath them."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

WHY_NOT_RUN = {
    "diff": "a change to a program of the reader's; the same lines run in a python block of the how-to",
    "console": "shell commands; their parsing is tested, what they do is tested with the command line and in CI",
    "text": "a formula, or what the block above it printed, which is compared",
    "bibtex": "citations",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line, and the text block right beneath it, if any."""

    language: str
    text: str
    line: int
    printed: str | None


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a file in order."""
    source = path.read_text()
    found = list(_FENCE.finditer(source))
    return list(_with_output(source, found))


def _with_output(source: str, found: list[re.Match[str]]) -> Iterator[Block]:
    for match, after in itertools.zip_longest(found, found[1:]):
        printed = None
        if after and after["language"] == "text" and not source[match.end() : after.start()].strip():
            printed = after["text"]
        line = source.count("\n", 0, match.start()) + 1
        yield Block(match["language"], match["text"], line, printed)


_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def same_output(documented: str, printed: str, tolerance: float = 0.15) -> bool:
    """Whether two outputs agree: words and whole numbers exactly, decimals to a relative tolerance.

    Trained networks differ a little from processor to processor.
    """

    def words(text: str) -> list[str]:
        return _NUMBER.sub("#", text).split()

    pairs = zip(_NUMBER.findall(documented), _NUMBER.findall(printed), strict=False)
    close = all(abs(float(a) - float(b)) <= tolerance * abs(float(a)) + 5e-3 for a, b in pairs)
    return words(documented) == words(printed) and close
