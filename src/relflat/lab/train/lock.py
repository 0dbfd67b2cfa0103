"""One process at a time in the folder of a run."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relflat.errors import ConfigError

PATIENCE = (
    120.0  # seconds: a killed process is gone at once, but a network file system may take 90 s to notice
)


@contextmanager
def alone_in(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends.

    Args:
        folder: must exist.
        patience: seconds to wait for another process to leave.

    Raises:
        ConfigError: another process is still there after that.
    """
    if sys.platform == "win32":  # no such locks there
        yield
        return
    import fcntl

    held = (
        folder / "config.json"
    )  # network file systems lock files only, and only such as are open for writing
    handle = os.open(held, os.O_RDWR) if held.is_file() else os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"Another process is training in {folder}; wait for it, or end it, and try again."
                    ) from error
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)
