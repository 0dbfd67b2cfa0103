"""What bound an explicit strength needs: DNA at three times the usual learning rate, a penalty at every step.

By the batched networks of screening.py, SGD, no noise, validation data; layers 0 and 1 are hidden, 2 is the output.

python benchmarks/bound_of_strength.py --tables DIR      some minutes; writes results/bound_of_strength.json
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import screening
from output import RESULTS
from screening import Cell, Method, Networks

BOUNDS = (0.3, 1.0, math.inf)
CELL = Cell("dna", 0.0, "sgd", 3.0, "cross-entropy")
ALL, ONE = (0.0003, 0.001, 0.003, 0.03), (0.001, 0.003, 0.01, 0.1)  # strengths


class Some(Networks):
    """Networks of which each has a penalty on some of its layers only."""

    chosen: Sequence[Tensor] = ()

    def kappas(self, features: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Those of the layers, 0 for one that is not penalised."""
        return [k * on for k, on in zip(super().kappas(features, generator), self.chosen, strict=True)]


def trained(
    strengths: Sequence[float], layers: Sequence[str], seeds: Sequence[int], epochs: int, tables: Path
) -> list[dict[str, Any]]:
    """A row a network: of which layers the penalty was, its strength and bound, and how training ended."""
    grid = list(itertools.product(layers, strengths, BOUNDS))
    runs = list(itertools.product(seeds, grid))
    Some.chosen = [torch.tensor([float(layer in ("all", str(k))) for _, (layer, *_) in runs]) for k in range(3)]
    screening.Networks, screening.EPOCHS = Some, epochs  # type: ignore[misc]
    # a size is a strength times the number of layers
    methods = [(seed, Method(f"{how}", 3 * how[1], how[2])) for seed, how in runs]
    rows = screening.train(CELL, methods, tables, test=False)
    names = ("finite", "accuracy", "training_accuracy", "bounded")
    return [
        {"layer": layer, "strength": strength, "bound": None if bound == math.inf else bound, "seed": seed}
        | {"epochs": epochs} | {name: row[name] for name in names}
        for (seed, (layer, strength, bound)), row in zip(runs, rows, strict=True)
    ]  # fmt: skip


def lost(row: dict[str, Any]) -> bool:
    """Whether training ended in no numbers or in a constant: 52 % of DNA are of one class."""
    return not row["finite"] or row["training_accuracy"] < 0.54


def show(rows: Sequence[dict[str, Any]]) -> None:
    """How many of the networks were lost."""
    print("| layer | strength | bound 0.3 | bound 1 | none |\n|---|---|---|---|---|")
    for layer, strength in dict.fromkeys((r["layer"], r["strength"]) for r in rows):
        mine = [r for r in rows if (r["layer"], r["strength"]) == (layer, strength)]
        by = [[lost(r) for r in mine if r["bound"] == bound] for bound in (0.3, 1.0, None)]
        print(f"| {layer} | {strength:g} |", " | ".join(f"{sum(b)} of {len(b)}" for b in by), "|")


def main() -> None:
    """Train, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = trained(ALL, ("all",), range(300, 303), 15, given.tables)
    rows += trained(ONE, ("0", "1", "2"), range(300, 302), 12, given.tables)
    (RESULTS / "bound_of_strength.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
