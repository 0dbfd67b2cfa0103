"""``relflat measure``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relflat.cli.console import out, print_json


def measure(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    layer: str | None = None,
    split: Literal["train", "validation", "test"] = "train",
    curvature: Literal["hessian", "ggn"] = "hessian",
    method: Literal["auto", "closed_form", "exact", "probe", "finite_difference"] = "auto",
    probes: int | None = None,
    adaptive: bool = False,
    normalize_features: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Measure the relative flatness of a layer of a trained run.

    Args:
        run: the run's folder.
        layer: name of the layer; by default the output layer.
        split: which samples to measure on.
        curvature: the Hessian or its Gauss-Newton part.
        method: how to compute it.
        probes: number of random probes where it is not exact.
        adaptive: the elementwise form.
        normalize_features: divide features by their deviation first.
        seed: of the probes.
        json: print one JSON object.
    """
    from relflat.lab.measuring import measure_run

    flat = measure_run(
        run,
        layer=layer,
        split=split,
        curvature=curvature,
        method=method,
        probes=probes,
        adaptive=adaptive,
        normalize_features=normalize_features,
        seed=seed,
    )
    if json:
        print_json({"run": str(run), "split": split, **asdict(flat)})
        return
    out.print(str(flat))
    for name, value in asdict(flat).items():
        out.print(f"  {name:<14} {value}")
