"""Tasks from a file of the user's: ``path/to/file.py:name``."""

import hashlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from relflat.errors import ConfigError, DataError, RelflatError
from relflat.lab.common.names import look_up
from relflat.lab.data.fetch import cache_folder
from relflat.lab.tasks.task import Task

KNOWN = "tasks-used-here"  # in the cache: digest and path of each file that was imported


def split_name(task: str) -> tuple[Path, str] | None:
    """Path and name of ``path/to/file.py:name``, or None for the name of a built-in task."""
    path, name = (task, "") if task.endswith(".py") else task.rpartition(":")[::2]
    return (Path(path).expanduser().resolve(), name) if path.endswith(".py") else None


def load(path: Path, name: str, task: str) -> Task:
    """The task of this name in a file, which the user calls ``task``; without a name, what may be meant is listed."""
    found = {key: value for key, value in vars(module_of(path, digest_of(path))).items() if isinstance(value, Task)}
    if not found:
        raise ConfigError(
            f"{path} defines no Task; write  {name or 'task'} = Task(...)  in it "
            "(from relflat.lab.tasks import Task)."
        )
    if not name:
        meant = " or ".join(f"{task}:{key}" for key in found)
        raise ConfigError(f"{task} is a file; which task in it? Did you mean {meant}?")
    return look_up(f"task in {path.name}", name, found)


def digest_of(path: Path) -> str:
    """The SHA-256 of the file."""
    return hashlib.sha256(content_of(path)).hexdigest()


def content_of(path: Path) -> bytes:
    """The file as it is."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read the task file {path}: {error.strerror}. Check the path.") from error


@cache
def module_of(path: Path, digest: str) -> Any:
    """Import the file, once for each content of it: this content, and not what Python has compiled and kept of it."""
    content = content_of(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ConfigError(f"The task file {path} was changed while it was read; try again.")
    name = f"relflat_task_{digest[:12]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # so that classes defined in the file know their module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # what lies beside the file can be imported, as by python FILE
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except RelflatError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and be a script that ends
        del sys.modules[name]
        raise ConfigError(f"The task file {path} raises an error; mend it:\n{traceback_from(path, error)}") from error
    with suppress(OSError):  # then it has to be named again
        if not is_known(path):
            cache_folder().mkdir(parents=True, exist_ok=True)
            with (cache_folder() / KNOWN).open("a", encoding="utf-8") as file:
                file.write(f"{digest}  {path}\n")
    return module


def is_known(path: Path) -> bool:
    """Whether a command of this user has imported this file with this content before."""
    known = cache_folder() / KNOWN
    return known.is_file() and f"{digest_of(path)}  {path}" in known.read_text("utf-8", "replace").splitlines()


def require_known(task: str, what: str) -> None:
    """See that a task's file, where it has one, was named by this user before, not only by a run from elsewhere."""
    place = split_name(task)
    if place is not None and not is_known(place[0]):
        raise DataError(
            f"{what} names the task file {place[0]}, which was never used here as it is now, so it is not imported. "
            f"If you trust that file, add --task {task}."
        )


@contextmanager
def blamed(task: str) -> Iterator[None]:
    """Explain an error of a task of the user's by the part of the traceback from its file on.

    Errors of built-in tasks pass as they are; else code of the file raised something, or what it gave did when used.
    """
    place = split_name(task)
    try:
        yield
    except (Exception, SystemExit) as error:  # the user's code may raise anything, explained while measuring or not
        if place is None or (isinstance(error, RelflatError) and not isinstance(error.__cause__, RuntimeError)):
            raise
        path = place[0]
        inside = any(frame.filename == str(path) for frame in traceback.extract_tb(error.__traceback__))
        what = "raises an error" if inside else "gives does not work together"
        raise ConfigError(
            f"{'The' if inside else 'What the'} task file {path} {what}; mend it, and the same command goes on:\n"
            f"{traceback_from(path, error)}"
        ) from error


def traceback_from(path: Path, error: BaseException) -> str:
    """The traceback from the task file on, or its last frame; without torch's between a module's call and forward."""
    frames = traceback.extract_tb(error.__traceback__)
    last = len(frames) - (not isinstance(error, SyntaxError))  # which names its line itself
    start = next((at for at, frame in enumerate(frames) if frame.filename == str(path)), last)
    shown = [frame for frame in frames[start:] if frame.filename != nn.modules.module.__file__]
    return "".join(traceback.format_list(shown) + traceback.format_exception_only(error)).rstrip()
