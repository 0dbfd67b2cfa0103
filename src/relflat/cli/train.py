"""``relflat train``."""

import json as jsons  # an option is called json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relflat.cli.console import aside, out, print_json, progress, say
from relflat.cli.options import TaskName, run_values
from relflat.errors import ConfigError

if TYPE_CHECKING:
    RunValues = dict[str, Any]
else:
    RunValues = run_values()


def train(
    task: TaskName,
    /,
    *,
    run: RunValues,
    config: Path | None = None,
    runs: Path = Path("runs"),
    name: str | None = None,
    fresh: bool = False,
    no_test: bool = False,
    json: bool = False,
) -> None:
    """Train a task by one algorithm, and evaluate its test split once at the end.

    An interrupted run goes on where it stopped, to the same numbers; a finished one is only read.

    Args:
        task: name of a task, or path/to/file.py:name for one of your own.
        run: what the numbers depend on; what is left out comes from the config file, the task or the algorithm.
        config: TOML or JSON file with values under the same names; options given here win.
        runs: folder that keeps the runs.
        name: name of this run's folder; by default task, algorithm and a hash of all values.
        fresh: remove an earlier run of this folder and start again.
        no_test: leave the test split alone; without this option it is evaluated once, at the end.
        json: print one JSON object; the bins of the calibration error are in result.json only.
    """
    from relflat.lab.tasks.catalogue import task_named
    from relflat.lab.train import loop
    from relflat.lab.train.config import make
    from relflat.lab.train.session import joined
    from relflat.lab.train.store import folder_of, result_of

    from_file = read_file(config) if config else {}
    with aside():
        resolved = make({**from_file, **run, "task": task})
    folder = folder_of(resolved, runs, name)
    metric = task_named(task).metric
    before = not fresh and result_of(folder) is not None
    with (
        joined() as process,
        progress(resolved.epochs, metric.name, shown=process.is_main_process) as on_epoch,
        aside(),
    ):
        result = loop.train(resolved, folder, test=not no_test, fresh=fresh, on_epoch=on_epoch)
    if not process.is_main_process:
        return
    if before:
        say(f"{folder} was finished before: nothing was trained. Give --fresh to train it again.")
    if json:
        print_json({"run": str(folder), "config": resolved.flat(), "result": without_bins(result)})
        return
    show(result, metric.name, metric.title)
    out.print(f"run        {folder}", soft_wrap=True)


def show(result: Mapping[str, Any], metric: str, title: str) -> None:
    """Print what a run came to."""
    if result["status"] != "finished":
        say(f"diverged after {result['epochs']} epochs: {result['reason']}")
    splits = {split: (result[split], "") for split in ("train", "validation", "test") if result[split]}
    splits |= {name: (found, "  (test, shifted)") for name, found in result.get("shifts", {}).items()}
    for name, (found, note) in splits.items():
        out.print(f"{name:<10} {title} {found[metric]:.4f}  loss {found['loss']:.4f}{note}")
    if flat := result["flatness"]:
        out.print(
            f"kappa      {flat['value']:.5g} ({flat['layer']}, {flat['method']})  "
            + ("" if flat["confidence"] is None else f"confidence {flat['confidence']:.4f}  ")
            + f"||W|| {flat['weight_norm']:.4g}  ||phi||^2 {flat['feature_norm2']:.4g}"
        )


def without_bins(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the long lists in it."""
    return {
        name: without_bins(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name != "bins"
    }


def read_file(path: Path) -> dict[str, Any]:
    """Read the keys and values of a TOML or JSON file."""
    try:
        values = (jsons if path.suffix == ".json" else tomllib).loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except ValueError as error:
        kind = path.suffix.lstrip(".") or "TOML"
        raise ConfigError(f"The config file {path} is not valid {kind}: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {path} must hold a table of keys and values.")
    return values
