"""``relflat measure``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from relflat import Flatness
from relflat.cli.checkpoints import must_be_there
from relflat.cli.console import aside, out, print_json, print_table, say, watching
from relflat.errors import ConfigError
from relflat.options import Curvature
from relflat.plot.shown import ByLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = (".svg", ".png", ".pdf")


def measure(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE.py:NAME")],
    /,
    *,
    checkpoint: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="FILE [FILE ...]")] = None,
    task: str | None = None,
    layer: str | None = None,
    split: Literal["train", "validation", "test"] = "train",
    samples: int | None = None,
    curvature: Curvature = "hessian",
    method: Literal["auto", "closed_form", "exact", "probe", "finite_difference", "xtrace"] = "auto",
    probes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: 16; xtrace: 32)")] = None,
    rtol: float | None = None,
    adaptive: bool = False,
    normalize_features: bool = False,
    seed: int = 0,
    plot: Path | None = None,
    unsafe: bool = False,
    json: bool = False,
) -> None:
    """Measure the relative flatness of layers of a trained run, or of a model of your own.

    Args:
        run: the run's folder; or path/to/file.py:make, a function that returns (model, loss, data), as
            relative_flatness takes them.
        checkpoint: files of weights for that model, measured one after the other: safetensors or of torch.save.
        task: path/to/file.py:name, to import the task file of a run from elsewhere, which you trust.
        layer: name or glob of layers or parameters ("conv2", "*", "fc,output"); by default the output layer.
        split: which samples to measure on.
        samples: the first so many of them only.
        curvature: the Hessian or its Gauss-Newton part.
        method: how to compute it.
        probes: number of random probes where it is not exact; for xtrace products, an even number.
        rtol: draw probes until the standard error is below this share of the value.
        adaptive: the elementwise form.
        normalize_features: divide features by their deviation first.
        seed: of the probes.
        plot: file for a picture: .svg, .png or .pdf.
        unsafe: run the code in checkpoints that hold more than tensors; for files that you trust.
        json: print one JSON object.
    """
    options: dict[str, Any] = {"curvature": curvature, "method": method, "probes": probes, "rtol": rtol, "seed": seed}
    options |= {"adaptive": adaptive, "normalize_features": normalize_features}
    if plot is not None:
        must_be_a_picture(plot)
    if ".py" in run.name:
        must_go_with_a_function(run, {"task": task, "samples": samples, "split": split != "train"}, checkpoint)
        measure_made(str(run), checkpoint or (), layer, unsafe=unsafe, plot=plot, as_json=json, **options)
        return
    must_be_a_run(run, checkpoint, unsafe=unsafe)
    from relflat.lab.train.measuring import measure_run
    from relflat.lab.train.session import this_process

    with aside(), watching() as watched:
        found = measure_run(run, task=task, layer=layer, split=split, samples=samples, watched=watched, **options)
    if this_process().is_main_process:
        show(found, {"run": str(run), "split": split} if json else None)
        if plot is not None:
            keep(ByLayer(found).plot(), plot)


def must_go_with_a_function(name: Path, of_runs: Mapping[str, Any], checkpoint: Sequence[Path] | None) -> None:
    """Refuse what only runs have, and checkpoints that name no file or one that is not there."""
    for option, given in of_runs.items():
        if given:
            raise ConfigError(f"--{option} is for runs; {name} says itself what the data are.")
    if checkpoint == ():
        raise ConfigError("--checkpoint names no file; name one, or leave it out to measure the model as it is made.")
    for path in checkpoint or ():
        must_be_there(path)


def must_be_a_run(run: Path, checkpoint: Sequence[Path] | None, *, unsafe: bool) -> None:
    """Refuse what only models of the user's own have, and folders that are not there."""
    if checkpoint is not None or unsafe:
        raise ConfigError(f"--checkpoint and --unsafe go with a function of yours, path/to/file.py:make, not {run}.")
    if not run.is_dir():
        raise ConfigError(
            f"{run} is not a run: there is no such folder. Train one with: relflat train TASK --runs DIR; or name a "
            "function of yours that returns (model, loss, data): path/to/file.py:make"
        )


def measure_made(
    name: str,
    checkpoints: Sequence[Path],
    layer: str | None,
    *,
    unsafe: bool,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what a function of the user's makes, print and draw it: layers, or their history over checkpoints."""
    from relflat.cli.own import measure_own, sweep_table

    with aside():
        found = measure_own(name, checkpoints, layer, unsafe=unsafe, **options)
    first = next(iter(found.values()))
    if as_json:
        measured = [{"checkpoint": title or None, "layers": flats.to_dict()} for title, flats in found.items()]
        print_json({"model": name, "measured": measured})
    elif len(found) == 1:
        out.print(str(first), soft_wrap=True)
    else:
        print_table("kappa", *sweep_table(found))
    if plot is not None:
        keep(first.plot() if len(found) == 1 else over_checkpoints(found), plot)


def over_checkpoints(found: Mapping[str, ByLayer]) -> "Axes":
    """A line for each layer over the checkpoints, which are named."""
    from relflat.plot import history

    axes = history(list(enumerate(found.values())))
    axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
    axes.set_xlabel("checkpoint")
    return axes


def must_be_a_picture(path: Path) -> None:
    """Refuse other endings, and folders that are not there, before anything is measured."""
    if path.suffix not in PICTURES:
        raise ConfigError(f"--plot {path}: the ending says what is written; choose one of {', '.join(PICTURES)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}.")


def keep(axes: "Axes", path: Path) -> None:
    """Write a picture, and say so."""
    import matplotlib.pyplot as plt

    from relflat.plot.style import STYLE

    figure = axes.get_figure(root=True)
    assert figure is not None
    with plt.rc_context(STYLE):
        figure.savefig(path)
    plt.close(figure)
    say(f"drew {path}")


def show(found: Mapping[str, Flatness], about: Mapping[str, str] | None) -> None:
    """Print what was measured of each layer, for people or, with what is said about it, as one JSON object."""
    if about is not None:
        layers = {name: asdict(flat) for name, flat in found.items()}
        only = next(iter(layers.values())) if len(layers) == 1 else {"layers": layers}
        print_json({**about, **only})
        return
    for flat in found.values():
        out.print(str(flat), soft_wrap=True)
        for name, value in asdict(flat).items():
            out.print(f"  {name:<14} {value}")
