"""Functions run on several ranks, over gloo on the loopback interface, with a time limit on everything."""

import datetime
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # for a whole run, on a busy machine
WAIT = 60  # for one collective
ONCE = [  # what ranks are forked with: each would take seconds to import it
    "torch.distributed.fsdp",
    "torch._dynamo.backends.debugging",
    "torch.utils.tensorboard",
    "accelerate.tracking",
    "sklearn.datasets",
    "relflat.cli.main",
    "relflat.lab.train.loop",
    "relflat.lab.train.measuring",
]


def run(
    work: Callable[..., Any], ranks: int, *args: Any, wait: float = WAIT, limit: float = SECONDS, group: bool = True
) -> list[Any]:
    """What ``work(rank, *args)`` returns on every rank; an exception is returned as its text.

    Every rank has the environment that torchrun gives it, and unless told otherwise a process group.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(ONCE)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(work, rank, ranks, folder, port, wait if group else None, args), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
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
    os.environ |= {name: str(value) for name, value in given.items()}
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
