"""The folder of a run, written so that a reader never sees half a file.

config.json        every value the numbers depend on
environment.json   versions, machine, command
metrics.jsonl      one line an epoch
tensorboard/       the same as scalars
checkpoint-0012/   model.safetensors and state.pt, after epoch 12
result.json        there once the run is finished
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relflat.errors import ConfigError, DataError
from relflat.lab.common.jsonable import finite
from relflat.lab.tasks.catalogue import short_name
from relflat.lab.train.config import RENAMED, SCHEMA, RunConfig, make, require_unchanged
from relflat.lab.train.environment import describe

RESULT, CONFIG, METRICS, ENVIRONMENT = "result.json", "config.json", "metrics.jsonl", "environment.json"
PATIENCE = 120.0  # seconds: a network file system may take 90 to notice that the process that held a lock was killed


def folder_of(config: RunConfig, root: Path, name: str | None = None) -> Path:
    """Where a run lives: ``root/<name>``, by default ``root/<task>-<algorithm>-<hash of the configuration>``."""
    return root / (name or f"{short_name(config.task)}-{config.algorithm}-{config.digest}")


def check_folder(folder: Path, config: RunConfig, *, fresh: bool = False) -> None:
    """See whether this run may live in the folder, or replace an earlier one there; nothing is written."""
    if (folder / CONFIG).is_file():
        if not fresh:
            _same(folder, config)
    elif folder.exists() and not (folder.is_dir() and all(map(_begins, folder.iterdir()))):
        raise ConfigError(f"{folder} exists and is not a run's folder; choose another name.")


def _begins(entry: Path) -> bool:
    """Whether this is what a process leaves that is killed while it makes a run's folder."""
    return entry.name == ENVIRONMENT or entry.name.startswith((f".{ENVIRONMENT}-", f".{CONFIG}-"))


@contextmanager
def writing(place: Path, option: str = "--runs") -> Iterator[None]:
    """Explain why something cannot be written, and which option of the command line chooses another place."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write to {place}: {error.strerror or error}. Free some space or choose another place with "
            f"{option}; the same command goes on with what is kept."
        ) from error


def open_run(folder: Path, config: RunConfig, *, fresh: bool = False) -> None:
    """Make the folder, if need be without an earlier run, for a run that ``check_folder`` let through."""
    with writing(folder):
        if fresh and (folder / CONFIG).is_file():
            shutil.rmtree(folder)
        if not (folder / CONFIG).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / ENVIRONMENT, describe())
            write_json(folder / CONFIG, {"schema": SCHEMA, **config.flat()})


@contextmanager
def alone_in(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder of an opened run, once another process is done; the system lets go however this one ends."""
    try:
        held = FileLock(folder / CONFIG, preserve_lock_file=True).acquire(timeout=patience)
    except Timeout as error:
        raise ConfigError(
            f"Another process is training in {folder}; wait for it, or end it, and try again."
        ) from error
    with held:
        yield


def remove_unfinished(folder: Path, pattern: str = ".*") -> None:
    """Remove what a killed process had begun to write; such names start with a dot. Hold a run's folder meanwhile."""
    for entry in folder.glob(pattern):
        remove(entry)


def _same(folder: Path, config: RunConfig) -> None:
    """Reject a folder whose run has other settings."""
    old, new = read_json(folder / CONFIG), {"schema": SCHEMA, **config.flat()}
    if old == new:
        return
    advice = "Choose another --name, or replace it with --fresh"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if "schema" in keys:
        raise ConfigError(
            f"{folder} holds a run whose {CONFIG} has schema {old.get('schema', 1)}; runs of this version have "
            f"{SCHEMA}.{written_by(folder)} {advice}."
        )
    if keys == ["source"]:
        require_unchanged(config.task, old.get("source"), f"the run in {folder} was trained. {advice}")
    raise ConfigError(f"{folder} holds a run with other values of {', '.join(keys)}. {advice}.")


def config_of(folder: Path) -> RunConfig:
    """Read the configuration of a run, also of one that was written under schema 1; its task must be unchanged."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder} is not a run: it has no {CONFIG}. Train one with: relflat train TASK --runs DIR")
    values = read_json(path)
    schema = values.pop("schema", 1)
    if schema not in (1, SCHEMA):
        raise DataError(f"{path} has schema {schema}; this version reads 1 and {SCHEMA}.{written_by(folder)}")
    if schema == 1:
        names = {**RENAMED, "method": "algorithm"}  # a key that was left out had today's default
        values = {names.get(key, key): value for key, value in values.items()}
    try:
        config = make({key: value for key, value in values.items() if key != "source"})
    except ConfigError as error:
        raise DataError(f"The run's {path} does not fit here: {error}{written_by(folder)}") from error
    require_unchanged(config.task, values.get("source"))
    return config


def written_by(folder: Path) -> str:
    """A sentence on the version that wrote a run or comparison, where that is another one than this."""
    path = folder / ENVIRONMENT
    there = read_json(path).get("packages", {}).get("relflat") if path.is_file() else None
    here = describe()["packages"]["relflat"]
    return "" if there in (None, here) else f" It was written by relflat {there}; this is {here}."


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = folder / RESULT
    if not path.is_file():
        return None
    result = read_json(path)
    lacking = [key for key in ("status", "epochs", "train", "validation", "test") if key not in result]
    if lacking:
        raise damaged(path, f"it has no {', '.join(lacking)}")
    return result


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, none while there is no such file; a finished run has one an epoch."""
    path, result = folder / METRICS, result_of(folder)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise damaged(path, error) from error
    if result is not None and len(lines) != result["epochs"]:
        raise damaged(path, f"{len(lines)} epochs of {result['epochs']}")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object, which may turn out to be damaged."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds {value!r}")
    return value


def damaged(path: Path, why: object) -> DataError:
    """The error about a file that does not hold what it should, with what mends it."""
    remedy = {
        CONFIG: f"Remove {path.parent} and train again, or give relflat train --fresh.",
        METRICS: f"Remove {path.with_name(RESULT)}, if it is there, and give the same command again: both files are "
        "made anew from the checkpoint.",
    }
    again = remedy.get(path.name, "Remove it and give the same command again; it makes what is missing.")
    return DataError(f"{path} is damaged ({why}). {again}")


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What reading gives after writing: tuples are lists, numbers that are not finite are None."""
    return dict(json.loads(json.dumps(finite(value))))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object in one piece; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one piece; numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(finite(record)) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece."""
    put_in_place(path, lambda temporary: temporary.write_text(text))


def put_in_place(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or folder beside its place, under a name that starts with a dot, and rename it into place."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        make(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise


def remove(entry: Path) -> None:
    """Remove a file or folder, if it is there."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
