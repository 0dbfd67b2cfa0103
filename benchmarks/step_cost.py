"""What a training step costs with FAM and with SAM, relative to a plain one.

    python benchmarks/step_cost.py                       ResNet-18, output layer: the committed table
    python benchmarks/step_cost.py --suite hidden        hidden layers of an MLP and a transformer encoder
    python benchmarks/step_cost.py --suite layers        all layers at once: full, one of them a step, frozen
    python benchmarks/step_cost.py --model mlp --layers fc1 fc2

Times are paired in one process (``paired.py``); passes, operations and bytes are counted (``counting.py``).
Add a row in ``rows.py``, a network in ``networks.py``.
"""

import gc
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from counting import Passes, flops, passes, peak_bytes
from networks import NETWORKS
from output import RESULTS, environment, save, show
from paired import Ratio, Times, compare
from relflat import FAM
from relflat.errors import RelflatError
from rows import HIDDEN, LAYERS, OUTPUT, PLAIN, Row, Trainer, custom


@dataclass(frozen=True)
class Options:
    """Cost of a training step with FAM and SAM, relative to a plain step.

    Attributes:
        suite: which rows: the output layer, hidden layers, or all layers at once.
        model: the network; by default resnet18, or for hidden and all layers each that has rows.
        layers: FAM on these layers in place of the suite's rows.
        steps: timed steps of each row.
        batch: samples a step.
        peak: whether to count bytes too, for which the profiler takes gigabytes.
        threads: threads of torch; 0 for its own choice.
        json: where to write the results; by default ``benchmarks/results/step_cost_SUITE.json``.
    """

    suite: Literal["output", "hidden", "layers"] = "output"
    model: Literal["resnet18", "mlp", "transformer"] | None = None
    layers: list[str] = field(default_factory=list)
    steps: int = 40
    batch: int = 32
    peak: bool = True
    threads: int = 0
    json: Path | None = None


@dataclass(frozen=True)
class Cost:
    """Counted costs of one row, and what FAM said it did."""

    flops: int
    peak_bytes: int | None
    passes: Passes
    method: str
    kappa: float | None


def count(row: Row, network: str, samples: int, bytes_too: bool) -> Cost:
    """Count what one step of a row costs."""
    trainer = Trainer(row, network, samples)
    trainer.warm_up()
    seen = passes(trainer.model, trainer.step)
    operations = mean_flops(row, network, samples) if row.varies else flops(trainer.step)
    report = trainer.report()
    del trainer
    gc.collect()
    peak = peak_bytes(lambda: Trainer(row, network, samples)) if bytes_too else None
    return Cost(operations, peak, seen, report.get("method", ""), report.get("kappa"))


def mean_flops(row: Row, network: str, samples: int, few: int = 2) -> int:
    """Mean over draws of layers, counted on a few samples and scaled.

    All of it grows with the samples but one product with a layer's weight, which makes it 0.4 % too many at most.
    """
    trainer = Trainer(row, network, few)
    trainer.warm_up()
    assert isinstance(trainer.criterion, FAM)
    draws = 2 * len(trainer.criterion.layers)
    return flops(lambda: [trainer.step() for _ in range(draws)]) * samples // (few * draws)


def count_all(
    rows: tuple[Row, ...], network: str, samples: int, bytes_too: bool
) -> tuple[dict[str, Cost], dict[str, str], dict[str, Row]]:
    """Costs by label; why others cannot run yet, by label; the rows that can."""
    costs, failures, able = {}, {}, {}
    for row in rows:
        try:
            costs[row.label] = count(row, network, samples, bytes_too)
            able[row.label] = row
        except (RelflatError, RuntimeError) as error:
            failures[row.label] = f"{type(error).__name__}: {error}".splitlines()[0]
    return costs, failures, able


def measure(network: str, rows: tuple[Row, ...], options: Options) -> dict[str, Any]:
    """All rows of one network as plain values."""
    costs, failures, able = count_all(rows, network, options.batch, options.peak)
    trainers = {label: Trainer(row, network, options.batch) for label, row in able.items()}
    for trainer in trainers.values():
        trainer.warm_up()
    uneven = [label for label, row in able.items() if row.varies]
    times = compare({label: trainer.step for label, trainer in trainers.items()}, options.steps, uneven=uneven)
    plain = costs[PLAIN.label]
    results = [relative(label, costs[label], plain, times[label]) for label in able]
    return {"network": network, "batch": options.batch, "rows": results, "cannot_run": failures}


def relative(label: str, cost: Cost, plain: Cost, times: Times) -> dict[str, Any]:
    """One row's costs beside those of the plain step."""
    return {
        "row": label,
        "wall": asdict(times.wall),
        "processor": asdict(times.processor),
        "flops": cost.flops,
        "flops_ratio": cost.flops / plain.flops,
        "peak_bytes": cost.peak_bytes,
        "peak_ratio": cost.peak_bytes / plain.peak_bytes if cost.peak_bytes and plain.peak_bytes else None,
        "passes": asdict(cost.passes),
        "method": cost.method,
        "kappa": cost.kappa,
    }


def print_table(result: dict[str, Any]) -> None:
    columns = ("step", "wall time", "processor time", "s", "FLOPs", "peak memory", "trunk", "tail", "method")
    title = f"{result['network']}, batch {result['batch']}: relative to the plain step"
    show(title, columns, [_cells(row) for row in result["rows"]])
    for label, reason in result["cannot_run"].items():
        print(f"cannot run: {label}: {reason}")


def _cells(row: dict[str, Any]) -> list[str]:
    p = row["passes"]
    return [
        row["row"],
        str(Ratio(**row["wall"])),
        str(Ratio(**row["processor"])),
        f"{row['wall']['seconds']:.3f}",
        f"{row['flops_ratio']:.4f}",
        f"{row['peak_ratio']:.3f} ({row['peak_bytes'] / 2**20:.0f} MiB)" if row["peak_ratio"] else "-",
        f"{p['trunk_forward']}f {p['trunk_backward']}b",
        f"{p['tail_forward']}f {p['tail_backward']}b",
        row["method"],
    ]


def plan(options: Options) -> list[tuple[str, tuple[Row, ...]]]:
    """Networks with their rows."""
    if options.layers:
        return [(options.model or "resnet18", custom(options.layers))]
    if options.suite == "output":
        return [(options.model or "resnet18", OUTPUT)]
    suite = HIDDEN if options.suite == "hidden" else LAYERS
    names = [options.model] if options.model else list(suite)
    missing = [name for name in names if name not in suite]
    if missing:
        raise SystemExit(
            f"suite {options.suite!r} has no rows for {missing[0]}: use --layers, or --model {list(suite)}"
        )
    return [(name, suite[name]) for name in names]


def main() -> None:
    options = tyro.cli(Options)
    assert set(HIDDEN) | set(LAYERS) <= set(NETWORKS)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    where, results = environment(), []
    for network, rows in plan(options):
        results.append(measure(network, rows, options))
        print_table(results[-1])
    path = options.json or RESULTS / f"step_cost_{options.suite}.json"
    save(path, {"environment": where, "steps": options.steps, "results": results})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
