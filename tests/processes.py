"""Processes forked from one that has imported everything: ranks that work together, and the command by itself.

Or from one that has imported the library alone, for what concerns the imports.
"""

import atexit
import datetime
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from relflat.cli.main import main

SECONDS = 120  # for a whole run, on a busy machine
WAIT = 60  # for one collective
ONCE = [  # what would take seconds to import in each
    "torch.distributed.fsdp",
    "torch._dynamo.backends.debugging",
    "torch.utils.tensorboard",
    "accelerate.tracking",
    "sklearn.datasets",
    "relflat.cli.main",
    "relflat.lab.report.report",
    "relflat.lab.report.study",
    "relflat.lab.train.measuring",
]


def started(work: Callable[..., object], *args: Any) -> BaseProcess:
    """A process that does this work in the present environment; all are forked from the same one."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(ONCE)
    process = context.Process(target=_as_here, args=(dict(os.environ), work, args), daemon=True)
    process.start()
    return process


def _as_here(environment: dict[str, str], work: Callable[..., object], args: Any) -> None:
    os.environ.clear()
    os.environ |= environment
    work(*args)


def run(
    work: Callable[..., Any], ranks: int, *args: Any, wait: float = WAIT, limit: float = SECONDS, group: bool = True
) -> list[Any]:
    """What ``work(rank, *args)`` returns on every rank; an exception is returned as its text.

    Every rank has the environment that torchrun gives it, and unless told otherwise a process group over gloo on the
    loopback interface. There is a time limit on everything.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        at = [(work, rank, ranks, folder, port, wait if group else None, args) for rank in range(ranks)]
        processes = [started(_rank, *each) for each in at]
        end = time.monotonic() + limit
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not late, f"ranks {late} were not done after {limit} s"
        found = [Path(folder) / str(rank) for rank in range(ranks)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in found]


def _rank(
    work: Callable[..., Any], rank: int, ranks: int, folder: str, port: int, wait: float | None, args: Any
) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items() if ranks > 1}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    if wait is not None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=wait),
        )
    try:
        found = work(rank, *args)
    except Exception as error:
        found = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(found, Path(folder) / str(rank))
    if wait is not None and not isinstance(found, str):
        dist.destroy_process_group()


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def relflat(
    *arguments: str, ranks: int = 1, within: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Done:
    """The command in a process of its own, or in several that work together: the greatest code, all that was written.

    What is written by whatever means counts, as to a pipe; ``within`` is entered there first.
    """
    found = run(_command, ranks, arguments, within, group=False)
    assert all(isinstance(each, Done) for each in found), found
    codes, outs, errs = zip(*found, strict=True)
    return Done(max(codes), "".join(outs), "".join(errs))


def _command(rank: int, arguments: list[str], within: Callable[[], AbstractContextManager[object]]) -> Done:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        with within():
            code = exit_code(arguments)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return Done(code, *texts)


def timed_briefly() -> None:
    """Let comparisons time their steps in few rounds, as nobody uses those times."""
    if (timing := sys.modules.get("relflat.lab.train.timing")) is not None:
        timing.step_costs.__kwdefaults__["rounds"] = 5


BARE = """
import json, os, sys, tempfile
from relflat import FAM, relative_flatness
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    child = os.fork()
    if not child:
        break
    status = os.waitpid(child, 0)[1]
    for file in files:
        file.seek(0)
    print(json.dumps([os.waitstatus_to_exitcode(status), *(file.read() for file in files)]), flush=True)
else:
    sys.exit()
for number, file in enumerate(files, 1):
    os.dup2(file.fileno(), number)
exec(code, {"__name__": "__main__"})
"""


def python(code: str, *arguments: str) -> Done:
    """What ``python -c`` does with a program that imports the library first: forked after that, its own otherwise."""
    server = _bare()
    print(json.dumps([code, *arguments]), file=server.stdin, flush=True)
    return Done(*json.loads(server.stdout.readline()))


@functools.cache
def _bare() -> "subprocess.Popen[str]":
    server = subprocess.Popen([sys.executable, "-c", BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def exit_code(arguments: list[str]) -> int:
    """Do the command here, and say how it ended."""
    code = 0
    timed_briefly()
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code
