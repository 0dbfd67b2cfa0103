"""``relflat measure``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relflat import Flatness
from relflat.cli.console import aside, out, print_json
from relflat.options import Curvature, Method


def measure(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    task: str | None = None,
    layer: str | None = None,
    split: Literal["train", "validation", "test"] = "train",
    samples: int | None = None,
    curvature: Curvature = "hessian",
    method: Method = "auto",
    probes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: 16; xtrace: 32)")] = None,
    rtol: float | None = None,
    adaptive: bool = False,
    normalize_features: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Measure the relative flatness of layers of a trained run.

    Args:
        run: the run's folder.
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
        json: print one JSON object.
    """
    from relflat.lab.train.measuring import measure_run
    from relflat.lab.train.session import this_process

    with aside():
        found = measure_run(
            run,
            task=task,
            layer=layer,
            split=split,
            samples=samples,
            curvature=curvature,
            method=method,
            probes=probes,
            rtol=rtol,
            adaptive=adaptive,
            normalize_features=normalize_features,
            seed=seed,
        )
    if this_process().is_main_process:
        show(found, {"run": str(run), "split": split} if json else None)


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
