"""Where trials run: processes of this machine, or a Ray cluster.

Ray decides what runs where and repeats a trial whose machine was lost; nothing of that is done here. A trial keeps
its checkpoints in the folder of runs, so a repeated one goes on after its last finished epoch, and this folder has
to be the same one on all machines. Numbers are those of the local engine, bit for bit, where processors and package
versions are the same.
"""

import logging
import os
import platform
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import relflat
from relflat.errors import ConfigError, RelflatError
from relflat.lab.compare.trials import workers
from relflat.lab.names import look_up
from relflat.lab.train import store

T = TypeVar("T")

LOCAL, RAY = "local", "ray"
ENGINES = {LOCAL: "processes of this machine", RAY: "a Ray cluster"}
MARK = ".relflat-shared"  # in the folder of runs: by it a worker knows that it sees the same folder
RETRIES = 10  # of a trial whose machine was lost
PATIENCE = 5.0  # seconds until an address that does not answer is given up


def engine_named(
    name: str, *, processes: int, runs: Path, address: str | None = None, gpus: float = 0.0
) -> Executor:
    """What does the trials; use it in a ``with`` block.

    Args:
        name: ``"local"`` or ``"ray"``.
        processes: how many trials at a time, on one thread each; a cluster decides that itself.
        runs: folder that keeps the runs.
        address: ``host:port`` of a running Ray cluster; None: $RAY_ADDRESS, else a Ray of its own on this machine.
        gpus: GPUs a trial takes of a Ray cluster, or a share of one.

    Raises:
        ConfigError: no such engine, values that do not fit it, Ray is not installed or does not answer.
    """
    look_up("engine", name, ENGINES)
    if name == LOCAL:
        for option, value in (("--address", address), ("--gpus", gpus or None)):
            if value is not None:
                raise ConfigError(
                    f"{option} {value} belongs to a Ray cluster; add --engine ray, or leave it out."
                )
        return workers(processes)
    if processes < 1:
        raise ConfigError(f"workers={processes} must be above 0.")
    if not gpus >= 0:
        raise ConfigError(f"gpus={gpus} must not be negative.")
    return OnRay(runs, address or os.environ.get("RAY_ADDRESS"), processes, gpus)


@dataclass(frozen=True)
class Shared:
    """What a worker must have in common with the process that started the trials.

    Attributes:
        runs: the folder of runs.
        mark: content of a file in it.
        versions: of what the numbers depend on.
    """

    runs: Path
    mark: str
    versions: dict[str, str]

    def check(self) -> None:
        """See, on a worker, that all of it is the same here.

        Raises:
            ConfigError: it is not.
        """
        here = platform.node()
        try:
            same = (self.runs / MARK).read_text() == self.mark
        except OSError:
            same = False
        if not same:
            raise ConfigError(
                f"The worker on {here} does not see the folder {self.runs} of the machine that started the trials. "
                "Choose a folder with --runs that all machines share under the same path, on a network file system."
            )
        if versions() != self.versions:
            raise ConfigError(
                f"The worker on {here} has {told(versions())}, but trials were started with "
                f"{told(self.versions)}. Install the same versions on all machines."
            )


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on most."""
    return {"relflat": relflat.__version__, "torch": torch.__version__}


def told(values: dict[str, str]) -> str:
    """Names and versions as a phrase."""
    return " and ".join(f"{name} {version}" for name, version in values.items())


def mark_of(runs: Path) -> str:
    """Content of the mark in the folder of runs; made if it is not there.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with store.writing(runs):
        runs.mkdir(parents=True, exist_ok=True)
        if not (runs / MARK).is_file():
            store.write_text(runs / MARK, uuid.uuid4().hex)
        return (runs / MARK).read_text()


def on_worker(shared: Shared, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
    """What a Ray worker does: the same as a local one, if it sees the same folder."""
    torch.set_num_threads(1)
    shared.check()
    return fn(*args)


class OnRay(Executor):
    """Hands work to a Ray cluster, one CPU a piece.

    Args:
        runs: folder that keeps the runs, by its full path.
        address: of a running cluster; None: a Ray of its own on this machine.
        processes: CPUs of the latter.
        gpus: GPUs a piece.

    Raises:
        ConfigError: Ray is not installed or does not answer, or the folder cannot be written.
    """

    def __init__(self, runs: Path, address: str | None, processes: int, gpus: float) -> None:
        self._ray = import_ray()
        self._connected = not self._ray.is_initialized()
        if self._connected:
            connect(self._ray, address, processes)
        self._pieces: list[Any] = []
        try:
            self._shared = Shared(runs.absolute(), mark_of(runs.absolute()), versions())
            self._remote = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(on_worker)
        except BaseException:
            self.shutdown()
            raise

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Hand it to the cluster."""
        if kwargs:
            raise TypeError("Work for Ray takes positional arguments only.")
        piece = self._remote.remote(self._shared, fn, args)
        self._pieces.append(piece)
        future: Future[T] = Future()

        def settle(done: Future[T]) -> None:
            if not future.set_running_or_notify_cancel():
                return
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(self._explained(error))

        piece.future().add_done_callback(settle)
        return future

    def _explained(self, error: BaseException) -> BaseException:
        """Our own errors as they were raised on the worker; a lost worker in our words."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, RelflatError):
            return cause
        of_ray, of_the_work = self._ray.exceptions.RayError, self._ray.exceptions.RayTaskError
        if isinstance(error, of_ray) and not isinstance(error, of_the_work):
            return ConfigError(
                f"Ray gave a trial up, after {RETRIES} repetitions if its machine was lost: {error}\n"
                "The same command goes on with what is kept."
            )
        return error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop what is still running, and leave the cluster if it was joined here.

        A trial that is stopped goes on after its last finished epoch when it is started again.
        """
        if self._ray.is_initialized():
            for piece in self._pieces:
                self._ray.cancel(piece, force=True)
            if self._connected:
                self._ray.shutdown()
        self._pieces = []


def import_ray() -> Any:
    """The package, which reports nothing to its makers.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray; install it with: pip install 'relflat[ray]', or leave --engine out."
        ) from error
    return ray


def connect(ray: Any, address: str | None, processes: int) -> None:
    """Join the cluster at the address, or start a Ray on this machine that nothing else can reach.

    Raises:
        ConfigError: nothing answers there.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init(
            "local",
            num_cpus=processes,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
        return
    if address != "auto":
        answers(address)
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise ConfigError(f"Cannot join the Ray cluster at {address}: {error}") from error


def answers(address: str) -> None:
    """See, before Ray tries for minutes, whether anything listens there.

    Raises:
        ConfigError: it does not, or this is not an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16 or "/" in host:
        raise ConfigError(
            f"address={address!r} is not of the form HOST:PORT, as in 10.0.0.1:6379; or give auto."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at {address} ({error.strerror or error}). "
            "Start one with: ray start --head, and give the address it prints."
        ) from error
