"""The folder of a run, written so that a reader never sees half a file.

relflat-run.lock   held by the process that trains; it marks the folder as a run's
config.json        every value the numbers depend on
environment.json   versions, machine, command
metrics.jsonl      one line an epoch
tensorboard/       the same as scalars
checkpoint-0012/   model.safetensors and state.pt after epoch 12, and their SHA256SUMS
result.json        there once the run is finished
"""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relflat.errors import ConfigError, DataError
from relflat.lab.common.jsonable import finite
from relflat.lab.tasks import own
from relflat.lab.tasks.catalogue import short_name
from relflat.lab.train.config import FAM_BEFORE, RENAMED, SCHEMA, RunConfig, make, require_unchanged
from relflat.lab.train.environment import describe

RESULT, CONFIG, METRICS, ENVIRONMENT = "result.json", "config.json", "metrics.jsonl", "environment.json"
LOCK = "relflat-run.lock"  # made first and kept for good: it also says that the folder is a run's
REPORT_MARK = "relflat-report.lock"  # the same in the folder of a report
CHECKPOINT_FILES = WEIGHTS, STATE, SUMS = "model.safetensors", "state.pt", "SHA256SUMS"
CHECKPOINT = re.compile(r"checkpoint-(\d{4}|[1-9]\d{4,})")
WRITTEN = rf"{CHECKPOINT.pattern}|(?:result|config|environment)\.json|metrics\.jsonl"
REQUIRED = {"task", "seed", "epochs", "batch_size", "lr", "weight_decay", "train_size", "label_noise"}  # in CONFIG
PATIENCE = 120.0  # seconds: a network file system may take 90 to notice that the process that held a lock was killed


def folder_of(config: RunConfig, root: Path, name: str | None = None) -> Path:
    """Where a run lives: ``root/<name>``, by default ``root/<task>-<algorithm>-<hash of the configuration>``."""
    if name is not None and (name in ("", ".", "..") or set(name) & set("/\\:\0")):
        raise ConfigError(
            f"name={name!r} is not the name of a folder; put a path into --runs, and a plain name here."
        )
    return root / (name or f"{short_name(config.task)}-{config.algorithm}-{config.digest}")


def check_folder(folder: Path, config: RunConfig, *, fresh: bool = False) -> None:
    """See whether this run may live in the folder, or replace an earlier one there; nothing is written."""
    require_ours(folder, LOCK, CONFIG, REQUIRED, "a run's folder; choose another name")
    if fresh or not (folder / CONFIG).is_file():
        return
    old, new = read_json(folder / CONFIG), {"schema": SCHEMA, **config.flat()}
    advice = "Choose another --name, or replace it with --fresh"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if "schema" in keys:
        raise ConfigError(
            f"{folder} holds a run whose {CONFIG} has schema {old.get('schema', 1)}; runs of this version have "
            f"{SCHEMA}.{written_by(folder)} {advice}."
        )
    if keys == ["source"]:
        require_unchanged(config.task, old.get("source"), f"the run in {folder} was trained. {advice}")
    if keys:
        raise ConfigError(f"{folder} holds a run with other values of {', '.join(keys)}. {advice}.")


def require_ours(folder: Path, mark: str, file: str, keys: set[str], kind: str) -> None:
    """Refuse a folder that holds something, unless it has our mark or, of a version without marks, this JSON file."""
    if (folder / mark).is_file() or not folder.exists():
        return
    with suppress(OSError, DataError):  # there is no such file, or it is that of something else
        if read_json(folder / file).keys() >= keys:
            return
    if not folder.is_dir() or next(folder.iterdir(), None) is not None:
        raise ConfigError(f"{folder} exists and is not {kind}.")


class StorageError(ConfigError):
    """Files cannot be written, or another process holds them: no other configuration will help."""


@contextmanager
def writing(place: Path, option: str = "--runs") -> Iterator[None]:
    """Explain why something cannot be written, and which option of the command line chooses another place."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Cannot write to {place}: {error.strerror or error}. Free some space or choose another place with "
            f"{option}; the same command goes on with what is kept."
        ) from error


def open_run(folder: Path, config: RunConfig, *, fresh: bool = False) -> None:
    """Make the folder of a run that ``check_folder`` let through; ``fresh`` removes an earlier one, so hold it."""
    with writing(folder):
        if fresh:
            remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
        remove_unfinished(folder)
        if not (folder / CONFIG).is_file():
            write_json(folder / ENVIRONMENT, describe())
            write_json(folder / CONFIG, {"schema": SCHEMA, **config.flat()})


@contextmanager
def alone_in(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder of a run, once another process is done; the system lets go however this one ends.

    The lock is on a file of its own, which nothing replaces or removes.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(folder / LOCK, preserve_lock_file=True).acquire(timeout=patience)
        except Timeout as error:
            raise StorageError(
                f"Another process is training in {folder}; wait for it, or end it, and try again."
            ) from error
    with held:
        yield


def remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else, but for the lock."""
    (folder / RESULT).unlink(missing_ok=True)
    for entry in folder.glob("checkpoint-*"):
        if CHECKPOINT.fullmatch(entry.name):
            remove_files(entry, *CHECKPOINT_FILES)
    remove_files(folder / "tensorboard", "events.out.tfevents.*")
    for name in (METRICS, ENVIRONMENT, CONFIG):  # this last: nothing that is left may seem to be of another run
        (folder / name).unlink(missing_ok=True)


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove such files from a folder, and the folder if nothing else is left in it."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    with suppress(OSError):  # it is not there, or holds something that is not ours
        folder.rmdir()


def remove_unfinished(folder: Path, names: str = WRITTEN) -> None:
    """Remove what a killed process had begun to write under one of these names. Hold a run's folder meanwhile."""
    for entry in folder.glob(".*"):
        if re.fullmatch(rf"\.({names})-[0-9a-f]{{32}}", entry.name):
            remove(entry)


def config_of(folder: Path, task: str | None = None) -> RunConfig:
    """Read the configuration of a run, also one of an older schema; its task must be unchanged.

    A task file that only the run names is not imported; whoever trusts it gives it as ``task``.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder} is not a run: it has no {CONFIG}. Train one with: relflat train TASK --runs DIR")
    values = read_json(path)
    schema = values.pop("schema", 1)
    if schema not in range(1, SCHEMA + 1):
        raise DataError(f"{path} has schema {schema}; this version reads 1 to {SCHEMA}.{written_by(folder)}")
    if schema == 1:
        names = {**RENAMED, "method": "algorithm"}  # a key that was left out had today's default
        values = {names.get(key, key): value for key, value in values.items()}
    if schema < SCHEMA and str(values.get("algorithm")).startswith("fam"):
        values = {**FAM_BEFORE, **values}
        del values["warmup_steps"]
    if task is None:
        own.require_known(str(values.get("task")), str(path))
    else:
        values["task"] = task
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


def finished(folder: Path, test: bool) -> dict[str, Any] | None:
    """The result of a run that needs nothing more, or None; one that is to be tested must have been."""
    result = result_of(folder)
    open_end = result is not None and test and result["test"] is None and result["status"] == "finished"
    return None if open_end else result


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, none while there is no such file; a finished run has one an epoch."""
    path, result = folder / METRICS, result_of(folder)
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise damaged(path, error) from error
    if result is not None and len(lines) != result["epochs"]:
        raise damaged(path, f"{len(lines)} epochs of {result['epochs']}")
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object, which may turn out to be damaged."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds {value!r}")
    return value


def damaged(path: Path, why: object) -> DataError:
    """The error about a file that does not hold what it should, with what mends it."""
    again = f"Remove {path.parent.parent} and train again, or give relflat train --fresh."
    remedy = {
        **dict.fromkeys(CHECKPOINT_FILES, again),
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
    put_in_place(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


def put_in_place(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or folder beside its place, under a name that starts with a dot, and rename it into place."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        make(temporary)
        if path.is_dir():  # it holds something that is not ours
            for part in sorted(temporary.iterdir()):
                part.replace(path / part.name)
            temporary.rmdir()
        else:
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
