"""``relflat train``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from relflat.cli.arguments import TaskName
from relflat.cli.console import out, print_json, progress, say


def option(metavar: str, default: str) -> object:
    """How an option that may be left out is shown: its type, and who gives the default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"({default})")


class Values(TypedDict, total=False):
    """Values of the run; what is left out comes from the config file, the task or the algorithm.

    Attributes:
        algorithm: plain, smoothing, dropout, noise, sam, looksam, fam or fam-sam.
        seed: of initial weights, data order, label noise and probes.
        epochs: passes over the training data.
        batch_size: samples a step.
        lr: learning rate at the start.
        weight_decay: of the optimiser.
        train_size: train on so many samples only.
        label_noise: redraw each training label with this probability.
        precision: no (float32), bf16 or fp16, for training; evaluation is in float32.
        rho: radius of the step uphill.
        period: steps from one second pass to the next.
        alpha: weight of the direction kept in between.
        smoothing: share of each target that is spread over all classes.
        rate: probability of dropping an entry.
        sigma: deviation of plain noise.
        strength: lambda of the paper.
        layer: the layers it acts on, by name or glob; several with commas.
        radius: finite radius of the feature noise instead of kappa.
        curvature: ggn or hessian.
        gradient: full, frozen or weights.
        method: auto, closed_form, exact, probe or finite_difference.
        probes: random probes a step where kappa is not exact.
        adaptive: the elementwise form.
        every: add the penalty every so many steps.
        warmup_steps: steps over which the strength grows from 0.
        normalize_features: divide features by their deviation.
        temperature: of the softmax in kappa, for an output layer.
        unit_features: kappa with features of norm 1, for an output layer.
        remove_after: steps after which the penalty is taken away.
        weight_cap: greatest norm of the layer's weight while the penalty is there.
        layers_per_step: of several layers, draw so many for each step.
    """

    algorithm: Annotated[str, option("NAME", "default: plain")]
    seed: Annotated[int, option("INT", "default: 0")]
    epochs: Annotated[int, option("INT", "default: the task's")]
    batch_size: Annotated[int, option("INT", "default: the task's")]
    lr: Annotated[float, option("FLOAT", "default: the task's")]
    weight_decay: Annotated[float, option("FLOAT", "default: the task's")]
    train_size: Annotated[int, option("INT", "default: all")]
    label_noise: Annotated[float, option("FLOAT", "default: 0")]
    precision: Annotated[str, option("NAME", "default: no")]
    rho: Annotated[float, option("FLOAT", "sam, looksam, fam-sam; default: 0.05")]
    period: Annotated[int, option("INT", "looksam; default: 5")]
    alpha: Annotated[float, option("FLOAT", "looksam; default: 0.7")]
    smoothing: Annotated[float, option("FLOAT", "smoothing; default: 0.1")]
    rate: Annotated[float, option("FLOAT", "dropout; default: 0.1")]
    sigma: Annotated[float, option("FLOAT", "noise; default: 0.1")]
    strength: Annotated[float, option("FLOAT", "fam; default: 0.1")]
    layer: Annotated[str, option("LAYER", "fam; default: output; dropout, noise: *")]
    radius: Annotated[float, option("FLOAT", "fam; default: none")]
    curvature: Annotated[str, option("NAME", "fam; default: ggn")]
    gradient: Annotated[str, option("NAME", "fam; default: full")]
    method: Annotated[str, option("NAME", "fam; default: auto")]
    probes: Annotated[int, option("INT", "fam; default: 1")]
    adaptive: Annotated[bool, tyro.conf.FlagConversionOff, option("True|False", "sam, fam; default: False")]
    every: Annotated[int, option("INT", "fam; default: 1")]
    warmup_steps: Annotated[int, option("INT", "fam; default: 0")]
    normalize_features: Annotated[
        bool, tyro.conf.FlagConversionOff, option("True|False", "fam; default: False")
    ]
    temperature: Annotated[float, option("FLOAT", "fam; default: 1")]
    unit_features: Annotated[bool, tyro.conf.FlagConversionOff, option("True|False", "fam; default: False")]
    remove_after: Annotated[int, option("INT", "fam; default: none")]
    weight_cap: Annotated[float, option("FLOAT", "fam; default: none")]
    layers_per_step: Annotated[int, option("INT", "fam; default: all")]


def train(
    task: TaskName,
    /,
    *,
    run: Values,
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
        run: what the numbers depend on.
        config: TOML or JSON file with values under the same names; options given here win.
        runs: folder that keeps the runs.
        name: name of this run's folder; by default task, algorithm and a hash of all values.
        fresh: remove an earlier run of this folder and start again.
        no_test: leave the test split alone; without this option it is evaluated once, at the end.
        json: print one JSON object; the bins of the calibration error are in result.json only.
    """
    from relflat.lab.tasks.catalogue import task_named
    from relflat.lab.train import launch
    from relflat.lab.train import loop as training
    from relflat.lab.train.config import make, read_file
    from relflat.lab.train.store import folder_of, result_of

    from_file = read_file(config) if config else {}
    resolved = make({**from_file, **run, "task": task})
    folder = folder_of(resolved, runs, name)
    metric = task_named(task).metric
    before = not fresh and result_of(folder) is not None
    with (
        launch.process_group(),
        progress(resolved.epochs, metric.name) as on_epoch,
        redirect_stdout(sys.stderr),  # what a task's file prints is no part of the answer
    ):
        result = training.train(resolved, folder, test=not no_test, fresh=fresh, on_epoch=on_epoch)
    if launch.rank() != 0:
        return
    if before:
        say(f"{folder} was finished before: nothing was trained. Give --fresh to train it again.")
    if json:
        print_json({"run": str(folder), "config": resolved.flat(), "result": without_bins(result)})
        return
    if result["status"] != "finished":
        say(f"diverged after {result['epochs']} epochs: {result['reason']}")
    for split in ("train", "validation", "test"):
        if result[split]:
            out.print(
                f"{split:<10} {metric.title} {result[split][metric.name]:.4f}  loss {result[split]['loss']:.4f}"
            )
    for name, found in result.get("shifts", {}).items():
        out.print(
            f"{name:<10} {metric.title} {found[metric.name]:.4f}  loss {found['loss']:.4f}  (test, shifted)"
        )
    if result["flatness"]:
        flat = result["flatness"]
        out.print(
            f"kappa      {flat['value']:.5g} ({flat['layer']}, {flat['method']})  "
            + ("" if flat["confidence"] is None else f"confidence {flat['confidence']:.4f}  ")
            + f"||W|| {flat['weight_norm']:.4g}  ||phi||^2 {flat['feature_norm2']:.4g}"
        )
    out.print(f"run        {folder}", soft_wrap=True)


def without_bins(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the long lists in it."""
    return {
        name: without_bins(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if name != "bins"
    }
