"""All tasks by name: the ones built in, and those that a file of the user's defines."""

from collections import UserDict
from functools import cached_property
from importlib import import_module

from relflat.errors import ConfigError
from relflat.lab.common.names import look_up
from relflat.lab.tasks import own
from relflat.lab.tasks.task import Task

# Their top-level tasks are the built-in ones; imported when one is looked up, as the papers' tasks build on the lab.
PROVIDERS = ("relflat.lab.tasks.records", "relflat.papers.skull_tasks", "relflat.papers.modular_addition")


class Catalogue(UserDict[str, Task]):
    """Tasks by name; the providers' are read when it is first looked into."""

    def __init__(self) -> None:
        """Read nothing yet."""

    @cached_property
    def data(self) -> dict[str, Task]:  # type: ignore[override]
        """All tasks known so far."""
        places = [vars(import_module(name)) for name in PROVIDERS]
        objects = (value for place in places for value in (*place.values(), *place.get("RECORDS", {}).values()))
        return {value.name: value for value in objects if isinstance(value, Task)}


TASKS = Catalogue()


def register(task: Task) -> Task:
    """Make a task known by its name, in this process."""
    if TASKS.setdefault(task.name, task) is not task:
        raise ConfigError(f"There is a task called {task.name!r} already; give this one another name.")
    return task


def task_named(name: str) -> Task:
    """The task of this name, or the one that ``path/to/file.py:name`` defines."""
    place = own.split_name(name)
    return look_up("task", name, TASKS) if place is None else own.load(*place, name)


def full_name(name: str) -> str:
    """The name of a task with the whole path of its file, if it has one."""
    place = own.split_name(name)
    return name if place is None else f"{place[0]}:{place[1]}"


def short_name(name: str) -> str:
    """The name of a task for folders."""
    place = own.split_name(name)
    return name if place is None else f"{place[0].stem}-{place[1]}"


def title_of(name: str) -> str:
    """The name of a task for people: what a task of the user's calls itself, unless a built-in one is called so."""
    given = task_named(name).name
    return short_name(name) if given in TASKS else given


def source_of(name: str) -> str | None:
    """What stands for the task's code: the content of its file, and its version from 2 on; None for neither."""
    place, version = own.split_name(name), task_named(name).version
    parts = [] if place is None else [own.digest_of(place[0])[:12]]
    parts += [] if version == 1 else [f"version {version}"]
    return " ".join(parts) or None


def changed_since(name: str, recorded: str | None) -> str | None:
    """The beginning of a sentence about a task whose `source_of` is no longer what was recorded, or None."""
    now, place = source_of(name), own.split_name(name)
    if now == recorded:
        return None
    before, after = ((source or "").partition("version ") for source in (recorded, now))
    if before[0].strip() != after[0].strip():
        return f"The task file {name if place is None else place[0]} has changed since"
    return f"The task {short_name(name)!r} has changed (version {before[2] or 1}, now {after[2] or 1}) since"
