"""The command ``relflat`` in a process to be killed, forked from one that has imported everything already.

As a script it reads one JSON request a line, ``{"arguments", "log", "root", "fatal"}``, and answers with the number
of the process, then with how that ended. ``fatal`` makes it kill itself, as kill -9 does, just before so many changes
under ``root``.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "tempfile.mkstemp", "tempfile.mkdtemp"}


class Killable:
    """Starts the command again and again."""

    def __init__(self) -> None:
        self._zygote = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._ask, self._answer = self._zygote.stdin, self._zygote.stdout
        assert self._answer.readline() == "ready\n"

    def start(self, arguments: list[str], log: Path, root: Path, fatal: int = 0) -> int:
        """Start it; the number of its process."""
        request = {"arguments": arguments, "log": str(log), "root": str(root), "fatal": fatal}
        print(json.dumps(request), file=self._ask, flush=True)
        return int(self._answer.readline())

    def end(self) -> int:
        """Wait until it ends; its exit code, or the signal as a negative number."""
        return int(self._answer.readline())

    def close(self) -> None:
        """No more of it."""
        self._ask.close()
        self._zygote.wait()
        self._answer.close()


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


def be_command(request: dict[str, Any]) -> int:
    """In the child: the command itself; the number of changes goes to the end of its log."""
    from relflat.cli.main import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seen = watch(request["root"], request["fatal"])
    try:
        main(request["arguments"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    print(f"\nchanges: {seen['changes']}", flush=True)
    return code


def serve() -> None:
    """Fork for each request."""
    import relflat.cli.main
    import relflat.lab.report.report
    import relflat.lab.report.study  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = be_command(json.loads(line))
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
