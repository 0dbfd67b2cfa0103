"""Functions run on several ranks, over gloo on the loopback interface, with a time limit on everything."""

import datetime
import os
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


def run(work: Callable[..., Any], ranks: int, *args: Any, wait: float = WAIT, limit: float = SECONDS) -> list[Any]:
    """What ``work(rank, *args)`` returns on every rank; an exception is returned as its text."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "relflat"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(work, rank, ranks, folder, wait, args), daemon=True)
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


def _rank(work: Callable[..., Any], rank: int, ranks: int, folder: str, wait: float, args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
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
    if not isinstance(found, str):
        dist.destroy_process_group()
