"""The command ``relflat`` in a process to be killed, forked from one that has imported everything already."""

import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from processes import exit_code, started

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "tempfile.mkstemp", "tempfile.mkdtemp"}


def start(arguments: list[str], log: Path, root: Path, fatal: int = 0) -> BaseProcess:
    """Start it; ``fatal`` makes it kill itself, as kill -9 does, just before so many changes under ``root``."""
    return started(be_command, arguments, str(log), str(root), fatal)


def end(process: BaseProcess) -> int:
    """Wait until it ends; its exit code, or the signal as a negative number."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def watch(root: str, fatal: int) -> dict[str, int]:
    """Count changes of files under the root from now on, and die at one of them."""
    seen = {"changes": 0}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(args[0]).startswith(root):
            seen["changes"] += 1
            if seen["changes"] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def be_command(arguments: list[str], log: str, root: str, fatal: int) -> None:
    """In the child: the command itself; the number of changes goes to the end of its log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    seen = watch(root, fatal)
    code = exit_code(arguments)
    print(f"\nchanges: {seen['changes']}", flush=True)
    sys.exit(code)
