"""Running many configurations on local worker processes, one thread each."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

import torch

from relflat.errors import ConfigError, DataError, RelflatError
from relflat.lab.train import store
from relflat.lab.train.config import RunConfig
from relflat.lab.train.loop import train

SHARED = ["relflat.lab.train.loop", "relflat.lab.compare.trials", "sklearn.datasets", "torch._dynamo"]
FORKS, BLOCKS = sys.platform == "linux", hasattr(signal, "pthread_sigmask")  # the latter not on Windows
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Trial:
    """A finished run."""

    config: RunConfig
    result: dict[str, Any]  # its ``result.json``
    history: list[dict[str, Any]]  # its ``metrics.jsonl``

    @property
    def finished(self) -> bool:
        """False when training diverged."""
        return bool(self.result["status"] == "finished")

    @property
    def tested(self) -> dict[str, Any]:
        """What the report of a tested run keeps of it."""
        kept = {key: self.result[key] for key in ("status", "test", "flatness")}
        return {"seed": self.config.seed, **kept}


OnTrial = Callable[[Trial], object]


@dataclass(frozen=True)
class Job:
    """One run to do: its configuration, where runs are kept, and whether it may see the test split."""

    config: RunConfig
    runs: Path
    test: bool
    arm: str = ""  # of a comparison


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Have Ctrl-C wait for the end of the block, and a process started there not see it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if BLOCKS else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers(ProcessPoolExecutor):
    """Processes of one thread each, on Linux forked from one that imported all; by an error all end at once."""

    def __init__(self, count: int) -> None:
        context: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
        self._stop = context.Event()  # before, as it starts a process that lets signals through again
        if FORKS:
            context.set_forkserver_preload(SHARED)
            with interrupts_held():
                forkserver.ensure_running()
            context.Process(target=os.getpid).start()  # comes back when all is imported, which may be interrupted
        super().__init__(count, mp_context=context, initializer=start_worker, initargs=(self._stop, dict(os.environ)))

    def submit(self, fn: Callable[..., B], /, *args: Any, **kwargs: Any) -> Future[B]:
        """Hand it over; a process that starts for it leaves Ctrl-C to this one."""
        with interrupts_held():
            return super().submit(fn, *args, **kwargs)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Wait for what is running, or after an exception end it."""
        if kind is not None:
            self._stop.set()
        super().__exit__(kind, error, trace)


def start_worker(stop: Any, environment: Mapping[str, str]) -> None:
    """Compute on one thread, as several processes share the machine, and end when the parent is gone or says so."""
    if BLOCKS:  # where the process it is forked from does not
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)  # that of the parent now, not when the first process of it was started
    os.dup2(2, 1)  # what is printed here is no part of an answer
    torch.set_num_threads(1)
    for ends in (stop.wait, multiprocessing.parent_process().join):  # type: ignore[union-attr]  # it has one
        threading.Thread(target=end_after, args=(ends,), daemon=True).start()


def end_after(wait: Callable[[], object]) -> None:
    """Wait, for the end of the parent even by kill -9, then leave at once."""
    wait()
    os._exit(1)


def run_job(job: Job) -> Trial:
    """Do one run, go on with it, or read it if it is finished; return what it left behind."""
    folder = store.folder_of(job.config, job.runs)
    return Trial(job.config, train(job.config, folder, test=job.test, tensorboard=False), store.metrics_of(folder))


def attempt(job: Job) -> Trial | str:
    """Do one run, or say why it cannot be done; what concerns all runs, as data and disks do, is raised."""
    try:
        return run_job(job)
    except (store.StorageError, DataError):
        raise
    except Exception as error:  # whatever an algorithm raises on a network that it cannot train
        return str(error) if isinstance(error, RelflatError) else f"{type(error).__name__}: {error}"


def read_trial(job: Job) -> Trial | None:
    """A finished run, or None; a run that was to be tested must have been."""
    folder = store.folder_of(job.config, job.runs)
    result = store.finished(folder, job.test)
    return None if result is None else Trial(job.config, result, store.metrics_of(folder))


def each(
    pool: Executor, work: Callable[[A], B], items: Iterable[A], on_done: Callable[[B], object] = lambda made: None
) -> list[B]:
    """Do the work for every item, telling each result as it comes; the results in the order of the items.

    The first error stops the rest. A pool in another process needs work that can be sent there.
    """
    futures: list[Future[B]] = []
    seen = 0  # done when they were handed over, as by a pool that is this process itself
    try:
        for item in items:
            futures.append(pool.submit(work, item))
            if futures[-1].done() and seen == len(futures) - 1:
                on_done(futures[-1].result())
                seen += 1
        for future in as_completed(futures[seen:]):
            on_done(future.result())
    except BrokenExecutor as error:
        raise ConfigError(
            "A worker process ended in the middle of a run: killed, perhaps for want of memory, or by its task. Try "
            "fewer --workers; the same command goes on with what is kept."
        ) from error
    return [future.result() for future in futures]


class Here(Executor):
    """Does the work in this process, on one thread; what a pool of one would do without starting a process."""

    def submit(self, fn: Callable[..., B], /, *args: Any, **kwargs: Any) -> Future[B]:
        """Do it now."""
        future: Future[B] = Future()
        try:
            with one_thread():
                future.set_result(fn(*args, **kwargs))
        except Exception as error:  # a future keeps whatever was raised for the one who asks for its result
            future.set_exception(error)
        return future


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def workers(count: int) -> Executor:
    """A pool of single-thread processes; for one worker this process itself."""
    if count < 1:
        raise ConfigError(f"workers={count} must be above 0.")
    return Here() if count == 1 else Workers(count)
