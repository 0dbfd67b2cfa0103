"""Trials on a Ray cluster, one CPU each.

Ray decides what runs where and repeats a trial whose machine was lost. A trial keeps its checkpoints in the folder of
runs, so a repeated one goes on after its last finished epoch, and this folder has to be the same one on all machines.
Numbers are those of one machine, bit for bit, where processors and package versions are the same.
"""

import logging
import os
import platform
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import relflat
from relflat.errors import ConfigError, RelflatError
from relflat.lab.train import store

T = TypeVar("T")
RETRIES = 10  # of a trial whose machine was lost
MARK = ".relflat-shared"  # in the folder of runs: by it a worker knows that it sees the same folder


@dataclass(frozen=True)
class Shared:
    """What a worker on another machine must have in common with the process that started the trials."""

    runs: Path  # the folder, by its full path
    mark: str  # content of a file in it
    versions: dict[str, str]  # of packages

    @classmethod
    def of(cls, runs: Path) -> "Shared":
        """What this process has; the mark is made if it is not there."""
        with store.writing(runs):
            runs.mkdir(parents=True, exist_ok=True)
            if not (runs / MARK).is_file():
                store.write_text(runs / MARK, uuid.uuid4().hex)
            return cls(runs, (runs / MARK).read_text("utf-8"), versions())

    def check(self) -> None:
        """See, on a worker, that all of it is the same here."""
        here, path = platform.node(), self.runs / MARK
        if not path.is_file() or path.read_text("utf-8") != self.mark:
            raise ConfigError(
                f"The worker on {here} does not see the folder {self.runs} of the machine that started the trials. "
                "Choose a folder with --runs that all machines share under the same path, on a network file system."
            )
        if versions() != self.versions:
            ours, theirs = (" and ".join(map(" ".join, both.items())) for both in (versions(), self.versions))
            raise ConfigError(
                f"The worker on {here} has {ours}, but trials were started with {theirs}. "
                "Install the same versions on all machines."
            )


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on most."""
    return {"relflat": relflat.__version__, "torch": torch.__version__}


class OnRay(Executor):
    """Hands work to a Ray cluster.

    Without an address it is a Ray of its own on this machine, with so many CPUs, which nothing else can reach.
    """

    def __init__(self, runs: Path, address: str | None, processes: int, gpus: float) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "--engine ray needs Ray; install it with: pip install 'relflat[ray]', or leave --engine out."
            ) from error
        self._ray, self._joined = ray, not ray.is_initialized()
        if self._joined:
            self._join(address, processes)
        self._shared = Shared.of(runs.absolute())
        self._remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(on_worker)

    def _join(self, address: str | None, processes: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options |= {"num_cpus": processes, "object_store_memory": 100 * 2**20}
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            self._ray.init(address or "local", **options)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            raise ConfigError(f"Cannot join the Ray cluster at {address}: {error}") from error

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Hand it to the cluster; errors are raised as they were on the worker."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def settle(done: Future[T]) -> None:
            if (error := done.exception()) is None:
                future.set_result(done.result())
            else:
                future.set_exception(self._explained(error))

        self._remote.remote(self._shared, fn, args, kwargs).future().add_done_callback(settle)
        return future

    def _explained(self, error: BaseException) -> BaseException:
        cause = getattr(error, "cause", None)  # what the worker raised, in Ray's wrapping
        if isinstance(cause, RelflatError):
            return cause
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return error
        return ConfigError(
            f"Ray gave a trial up, after {RETRIES} repetitions if its machine was lost: {error}\n"
            "The same command goes on with what is kept."
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster if it was joined here, which stops what is still running."""
        if self._joined:
            self._ray.shutdown()


def on_worker(shared: Shared, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """What a Ray worker does: the same as a local one, if it sees the same folder."""
    torch.set_num_threads(1)
    shared.check()
    return fn(*args, **kwargs)
