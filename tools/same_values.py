"""Whether two versions of the library give the same numbers: values and gradients of small networks.

    PYTHONPATH=OLD/src python tools/same_values.py --save old.json
    PYTHONPATH=NEW/src python tools/same_values.py --save new.json --against old.json

Only what is public is called, in float64. A reading is exact where the library says that no random numbers were
used; exact ones must agree to 1e-12, the others (fixed seeds) are reported apart, as their random numbers may move.
Exits with 1 where an exact one differs, fails in one version only, or is missing.
"""

import argparse
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import relflat
from compared_readings import Record, all_readings, read

TOLERANCE = 1e-12
COUNTS = ("samples", "skipped", "strength")
Array = np.ndarray[Any, np.dtype[np.float64]]


def difference(old: Record, new: Record) -> float:
    """Largest difference relative to the size of the number; infinite where the readings do not fit."""
    if "error" in old or "error" in new:
        return 0.0 if old.get("error") == new.get("error") else math.inf
    if old.get("gradients", {}).keys() != new.get("gradients", {}).keys():
        return math.inf
    values, gradients = (_pairs(old.get(k, {}), new.get(k, {})) for k in ("values", "gradients"))
    if not len(values):
        return math.inf
    size = np.abs(values).max(1)
    lengths = np.abs(gradients).max(initial=0.0) * np.ones(len(gradients))
    return max(_apart(values, np.fmax(size, 1e-4 * np.nanmax(size))), _apart(gradients, lengths))


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Array:
    """The numbers that both have, in two columns."""
    common = [k for k in old if k in new and k.split(" ")[-1] not in COUNTS]
    found = [p for k in common for p in zip(np.atleast_1d(old[k]), np.atleast_1d(new[k]), strict=True)]
    return np.array(found).reshape(-1, 2)


def _apart(pairs: Array, scale: Array) -> float:
    """Largest difference between two columns, in units of the scale; what is not finite must be so in both."""
    finite = np.isfinite(pairs)
    if (finite[:, 0] != finite[:, 1]).any():
        return math.inf
    both = finite.all(1) & (pairs[:, 0] != pairs[:, 1])
    return float((np.abs(pairs[both, 0] - pairs[both, 1]) / scale[both]).max(initial=0.0))


def compare(old: Mapping[str, Record], new: Mapping[str, Record]) -> bool:
    """Print how far the readings are apart; whether the exact ones agree."""
    both = [k for k in old if k in new]
    apart = {k: difference(old[k], new[k]) for k in both}
    missing = [k for k in old if k not in new]
    wrong = [
        _print_apart(what, {k: apart[k] for k in both if old[k]["exact"] is exact}, old, new)
        for what, exact in (("exact", True), ("stochastic", False))
    ]
    print(f"missing: {len(missing)}; only in the new one: {len(new.keys() - old.keys())}")
    _print_some(missing, str)
    _print_changed("message", both, old, new)
    _print_changed("method", both, old, new)
    return not (missing or wrong[0])


def _print_apart(what: str, apart: Mapping[str, float], old: Mapping[str, Record], new: Mapping[str, Record]) -> int:
    """Print a summary of some readings and those that differ; their number."""
    wrong = sorted((k for k in apart if not apart[k] <= TOLERANCE), key=lambda k: -apart[k])
    same = sum(a == 0 for a in apart.values())
    print(
        f"{what}: {len(apart)} readings, {same} identical, {len(wrong)} differ, "
        f"worst relative difference {max(apart.values(), default=0.0):.2g}"
    )
    _print_some(wrong, lambda k: f"{k}: {apart[k]:.2g} {_said(old[k])} -> {_said(new[k])}")
    return len(wrong)


def _print_changed(what: str, keys: list[str], old: Mapping[str, Record], new: Mapping[str, Record]) -> None:
    """Print the readings of which something that is no number has changed."""
    changed = [k for k in keys if old[k].get(what) != new[k].get(what)]
    print(f"another {what}: {len(changed)}")
    _print_some(changed, lambda k: f"{k}: {old[k].get(what)!r} -> {new[k].get(what)!r}")


def _said(record: Record) -> str:
    return f"[{record.get('error') or record['method']}]"


def _print_some(keys: list[str], line: Callable[[str], str], most: int = 3) -> None:
    """A few lines of each kind of reading, as names end in their kind."""
    kinds = defaultdict(list)
    for k in keys:
        kinds[k.rsplit(": ", 1)[-1]].append(k)
    for kind, members in kinds.items():
        print(f"  {kind}: {len(members)}")
        print("\n".join(f"    {line(k)}" for k in members[:most]))


def main() -> None:
    """Read, save and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="where to write the readings")
    parser.add_argument("--against", type=Path, help="readings of the version to compare with")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    found = {name: read(run) for name, run in all_readings()}
    seconds, exact = time.process_time() - start, sum(r["exact"] for r in found.values())
    refused = sum("error" in r for r in found.values())
    print(
        f"{relflat.__file__}: {len(found)} readings of {len({k.split(': ')[0] for k in found})} networks in "
        f"{seconds:.0f} s of processor time, {exact} exact ({refused} of them refusals)"
    )
    if options.save:
        options.save.write_text(json.dumps(found))
    if options.against and not compare(json.loads(options.against.read_text()), found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
