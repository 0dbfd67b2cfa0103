"""What files were like when they were written: their SHA-256, one a line, as ``sha256sum`` writes and checks them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

SUMS = "SHA256SUMS"


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(folder: Path, names: Iterable[str]) -> str:
    """The SHA-256 of these files of a folder; of one that is not there, nothing."""
    return "".join(f"{digest(folder / name)}  {name}\n" for name in names if (folder / name).is_file())


def changed(folder: Path) -> bool:
    """Whether files are not as the sums beside them have them; older versions wrote no sums."""
    if not (folder / SUMS).is_file():
        return False
    known = (folder / SUMS).read_text("utf-8", "replace")
    return known != sums(folder, [line.partition("  ")[2] for line in known.splitlines()])
