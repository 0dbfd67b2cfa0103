"""Tasks from a file of the user's: ``path/to/file.py:name``."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from relflat.errors import ConfigError, RelflatError
from relflat.lab.names import unknown

LIBRARY = Path(__file__).parents[2]
DETOURS = (
    "_wrapped_call_impl",
    "_call_impl",
    "inner",
)  # what torch puts between a module's call and its forward


def split_name(task: str) -> tuple[Path, str] | None:
    """Path and name of ``path/to/file.py:name``, or None for the name of a built-in task."""
    path, _, name = task.rpartition(":")
    return (Path(path).expanduser().resolve(), name) if path.endswith(".py") else None


def require_name(task: str, kind: type[Any]) -> None:
    """See that the path of a file is followed by the name of something in it.

    Args:
        task: as given.
        kind: what the name must stand for.

    Raises:
        ConfigError: it is a path alone; what may be meant is listed.
    """
    if not task.endswith(".py"):
        return
    path = Path(task).expanduser().resolve()
    known = defined(module_of(path, fingerprint(path)), kind)
    if not known:
        raise undefined(path, "task", kind)
    raise ConfigError(
        f"{task} is a file; which task in it? Did you mean {' or '.join(f'{task}:{name}' for name in known)}?"
    )


def defined(module: Any, kind: type[Any]) -> list[str]:
    """Names of the module's objects of this kind."""
    return [key for key, value in vars(module).items() if isinstance(value, kind)]


def undefined(path: Path, name: str, kind: type[Any]) -> ConfigError:
    """What is wrong with a file that defines nothing of this kind."""
    return ConfigError(
        f"{path} defines no {kind.__name__}; write  {name or 'task'} = {kind.__name__}(...)  in it "
        f"(from {kind.__module__} import {kind.__name__})."
    )


def fingerprint(path: Path) -> str:
    """Twelve hexadecimal digits that stand for the content of the file."""
    return hashlib.sha256(content(path)).hexdigest()[:12]


def content(path: Path) -> bytes:
    """The bytes of a task file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read the task file {path}: {error.strerror}. Check the path.") from error


def load(path: Path, name: str, kind: type[Any]) -> Any:
    """The object of this name in the file.

    Args:
        path: the file.
        name: of the object.
        kind: what it must be.

    Raises:
        ConfigError: the file cannot be read or raises, or it has no such object.
    """
    module = module_of(path, fingerprint(path))
    found = vars(module).get(name)
    if isinstance(found, kind):
        return found
    known = defined(module, kind)
    if not known:
        raise undefined(path, name, kind)
    raise unknown(f"task in {path.name}", name, known)


@contextmanager
def blamed(task: str) -> Iterator[None]:
    """Explain an error of a task of the user's by the part of the traceback from its file on.

    Args:
        task: name of the task; errors of built-in ones pass as they are.

    Raises:
        ConfigError: code of the file raised something, or what it gave was used and raised it.
    """
    place = split_name(task)
    try:
        yield
    except RelflatError:
        raise
    except Exception as error:  # the user's code may raise anything
        if place is None:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        what = (
            f"The task file {place[0]} raises an error"
            if any(frame.filename == str(place[0]) for frame in frames)
            else f"What the task file {place[0]} gives does not work together"
        )
        raise ConfigError(
            f"{what}; mend it, and the same command goes on:\n{of_file(error, place[0])}"
        ) from error


@cache
def module_of(path: Path, digest: str) -> Any:
    """Import the file, once for each content of it."""
    name = f"relflat_task_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that classes defined in the file know their module
    try:
        spec.loader.exec_module(module)
    except RelflatError:
        raise
    except Exception as error:  # the user's code may raise anything
        del sys.modules[name]
        raise ConfigError(
            f"The task file {path} raises an error; mend it:\n{of_file(error, path)}"
        ) from error
    return module


def of_file(error: Exception, path: Path) -> str:
    """The traceback from the task file on, without what called it; from this library's last line on without it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = max(
        (at for at, frame in enumerate(frames) if Path(frame.filename).is_relative_to(LIBRARY)), default=0
    )
    start = next((at for at, frame in enumerate(frames) if frame.filename == str(path)), ours)
    shown = [frame for frame in frames[start:] if frame.name not in DETOURS]
    lines = traceback.format_list(shown) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()
