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

import numpy as np
import torch

import relflat
from compared_readings import Record, all_readings, read

TOLERANCE = 1e-12


def difference(old: Record, new: Record) -> float:
    """Largest difference relative to the size of the number; infinite where the readings do not fit."""
    if "error" in old or "error" in new:
        return 0.0 if old.get("error") == new.get("error") else math.inf
    worst = 0.0
    for part in ("values", "gradients"):
        a, b = old.get(part, {}), new.get(part, {})
        if a.keys() != b.keys():
            return math.inf
        pairs = np.array(
            [(u, v) for k in a for u, v in zip(np.atleast_1d(a[k]), np.atleast_1d(b[k]), strict=True)]
        )
        worst = max(worst, _largest(pairs, own_scale=part == "values"))
    return worst


def _largest(pairs: np.ndarray, own_scale: bool) -> float:
    """Of values relative to themselves, or a thousandth of the largest; of gradients relative to the longest."""
    if not pairs.size:
        return 0.0
    if (np.isfinite(pairs[:, 0]) != np.isfinite(pairs[:, 1])).any():
        return math.inf
    pairs = pairs[np.isfinite(pairs).all(1)]
    size = np.abs(pairs).max(1, initial=0.0)
    largest = size.max(initial=1e-300)
    scale = np.maximum(size, 1e-3 * largest) if own_scale else largest
    return float((np.abs(pairs[:, 0] - pairs[:, 1]) / scale).max(initial=0.0))


def compare(old: Mapping[str, Record], new: Mapping[str, Record]) -> bool:
    """Print how far the readings are apart; whether the exact ones agree."""
    both = [k for k in old if k in new]
    apart = {k: difference(old[k], new[k]) for k in both}
    missing = [k for k in old if k not in new]
    agree = not missing
    for exact in (True, False):
        keys = sorted((k for k in both if old[k]["exact"] is exact), key=lambda k: -apart[k])
        wrong = [k for k in keys if not apart[k] <= TOLERANCE]
        same = sum(apart[k] == 0 for k in keys)
        what = "exact" if exact else "stochastic"
        worst = apart[keys[0]] if keys else 0.0
        print(
            f"{what}: {len(keys)} readings, {same} identical, {len(wrong)} differ, "
            f"worst relative difference {worst:.2g}"
        )
        _print_some(wrong, lambda k: f"{k}: {apart[k]:.2g} {_said(old[k])} -> {_said(new[k])}")
        agree = agree and not (exact and wrong)
    print(f"missing: {len(missing)}; only in the new one: {len(new.keys() - old.keys())}")
    _print_some(missing, str)
    for what in ("message", "method"):
        changed = [k for k in both if old[k].get(what) != new[k].get(what)]
        print(f"another {what}: {len(changed)}")
        _print_some(changed, lambda k, w=what: f"{k}: {old[k].get(w)!r} -> {new[k].get(w)!r}")
    return agree


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="where to write the readings")
    parser.add_argument("--against", type=Path, help="readings of the version to compare with")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found = {name: read(run) for name, run in all_readings()}
    seconds, exact = time.perf_counter() - start, sum(r["exact"] for r in found.values())
    refused = sum("error" in r for r in found.values())
    print(
        f"{relflat.__file__}: {len(found)} readings of {len({k.split(': ')[0] for k in found})} networks in "
        f"{seconds:.0f} s, {exact} exact ({refused} of them refusals)"
    )
    if options.save:
        options.save.write_text(json.dumps(found))
    if options.against and not compare(json.loads(options.against.read_text()), found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
