"""Collects the numbers of the studies' reports, which the documents quote, into ``results.json``.

    python docs/study/collect.py

Each ``report.json`` in a folder beside this file (written there by ``relflat compare --out`` or ``relflat reproduce
--out``; too large for git) replaces the entry of its study; entries of studies without one stay as they are.
A study has the command that produced it and its arms; an arm has its metrics; a metric has a value and, where it is
known, its standard deviation ``sd`` over seeds or its interval ``low`` to ``high`` and ``p``.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from relflat.lab.compare.statistics import differences as compared

HERE = Path(__file__).parent
Arms = dict[str, dict[str, Any]]
METRICS = ("loss", "ece", "equal_time", "kappa", "confidence", "weight_norm")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    values = list(values)
    return {"value": mean(values)} | ({"sd": stdev(values)} if len(values) > 1 else {})


def gain(difference: dict[str, Any]) -> dict[str, float]:
    """A paired difference to the first arm."""
    return {"value": difference["mean"]} | {key: difference[key] for key in ("low", "high", "p")}


def interval(numbers: list[float]) -> dict[str, float]:
    """A value with the two ends of its interval."""
    return dict(zip(("value", "low", "high"), numbers, strict=True))


def comparison(report: dict[str, Any]) -> Arms:
    """The arms of ``relflat compare``."""
    differences = {d["second"]: gain(d) for d in report["differences"]}
    arms: Arms = {}
    for arm in report["arms"]:
        means = {"accuracy": arm.get("score", arm.get("accuracy"))} | {m: arm[m] for m in METRICS}
        arms[arm["arm"]] = {"n": arm["n"], "diverged": arm["diverged"], "settings": arm["settings"]}
        arms[arm["arm"]] |= {m: dict(zip(("value", "sd"), pair, strict=True)) for m, pair in means.items()}
        cost = arm["cost"]
        arms[arm["arm"]]["step"] = {"value": cost["ratio"], "low": cost["low"], "high": cost["high"]}
        arms[arm["arm"]]["step_ms"] = {"value": 1000 * cost["seconds"]}
        if arm["title"] in differences:
            arms[arm["arm"]]["gain"] = differences[arm["title"]]
    for rival in sorted({"sam", "asam"} & arms.keys()) if "fam-default" in arms else ():
        arms["fam-default"][f"over_{rival}"] = paired(report["tested"], rival, "fam-default")
    return arms


def paired(tested: dict[str, list[dict[str, Any]]], *names: str) -> dict[str, float]:
    """The second arm's accuracy less the first one's on the same seeds; p is of this pair alone."""
    scores = {name: {run["seed"]: run["test"]["accuracy"] for run in tested[name]} for name in names}
    seeds = sorted(set.intersection(*({*own} for own in scores.values())))
    (found,) = compared({name: [own[seed] for seed in seeds] for name, own in scores.items()})
    return gain({"mean": found.mean, "low": found.low, "high": found.high, "p": found.p})


def tested(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the final runs of one arm."""
    found = {
        "accuracy": spread(run["test"]["accuracy"] for run in runs),
        "loss": spread(run["test"]["loss"] for run in runs),
        "kappa": spread(run["flatness"]["value"] for run in runs),
        "confidence": spread(run["flatness"]["confidence"] for run in runs),
    }
    return {"n": len(runs), **found}


def table1(data: dict[str, Any]) -> Arms:
    """The arms of both data sets."""
    arms: Arms = {}
    for part in data.values():
        gains = {d["second"]: gain(d) for d in part["differences"]}
        for arm in part["plan"]["arms"]:
            entry = {"settings": part["chosen"][arm["name"]], **tested(part["tested"][arm["name"]])}
            entry |= {"gain": gains[arm["title"]]} if arm["title"] in gains else {}
            arms[f"{part['task']}/{arm['name']}"] = entry
    return arms


def table2(data: dict[str, Any]) -> Arms:
    """The arms on the first evaluation set, and Dice against plain training."""
    arms: Arms = {}
    plain = data["arms"][0]["mean"]["first"]["dice"]
    for arm in data["arms"]:
        name = f"{arm['gradient']}/{arm['strength']:g}" if arm["gradient"] else "plain"
        first = {m: {"value": v} for m, v in arm["mean"]["first"].items()}
        difference = {"value": arm["mean"]["first"]["dice"] - plain}
        arms[name] = {"n": len(arm["runs"]), "collapsed": arm["collapsed"], **first, "gain": difference}
    return arms


def table3(data: dict[str, Any]) -> Arms:
    """The arms, and FAM against plain training."""
    arms = {name: tested(runs) for name, runs in data["runs"].items()}
    arms["fam"] |= {"gain": gain(data["difference"]), "strength": {"value": data["strength"]}}
    return arms


def cost(data: dict[str, Any]) -> Arms:
    """Times of each form for each layer, and of a training step."""
    arms: Arms = {
        f"{layer['where']}/{layer['width']}/{form}": {"ms": {"value": 1000 * found["seconds"]}}
        for layer in data["layers"]
        for form, found in layer["forms"].items()
    }
    for name, step in data["steps"].items():
        ratio = {"value": step["ratio"], "low": step["low"], "high": step["high"]}
        arms[name] = {"step": ratio, "added": {key: value - 1 for key, value in ratio.items()}}
    return arms


def associations(data: dict[str, Any]) -> Arms:
    """Rank and linear correlation with the generalisation gap, of ``correlation`` and of ``layers``."""
    return {
        f"{form}/{name}": {"n": found["n"], "tau": interval(found["tau"]), "r": interval(found["r"])}
        for form, measures in data["associations"].items()
        for name, found in measures.items()
    }


def invariance(data: dict[str, Any]) -> Arms:
    """Largest relative change of each measure under each change of the weights, and largest factor of it."""
    arms: Arms = {}
    for change, measures in data["changes"].items():
        cases = [network["cases"][change] for network in data["networks"]]
        for name, relative in measures.items():
            ratios = [case["after"][name] / case["before"][name] for case in cases]
            factor = max(max(ratio, 1 / ratio) for ratio in ratios)
            arms[f"{change}/{name}"] = {"change": {"value": relative}, "factor": {"value": factor}}
    return arms


def grokking(data: dict[str, Any]) -> Arms:
    """Epochs at which each seed generalises, and the last kappa."""
    return {
        name: {"n": len(runs), "generalised": [run["onset"]["generalised"] for run in runs]}
        | {"kappa": spread(run["onset"]["kappa"] for run in runs)}
        for name, runs in data["arms"].items()
    }


EXPERIMENTS = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "cost": cost,
    "correlation": associations,
    "layers": associations,
    "invariance": invariance,
    "grokking": grokking,
}


def command(words: list[str]) -> str:
    """The command as one types it, without the folders of that machine."""
    first = "make demo" if words[0].endswith("demo.py") else "relflat"
    words = [re.sub(r"^/\S*/(docs/study/)", r"\1", word) for word in words[1:]]
    return re.sub(r" --(out|runs) \S+", "", " ".join([first, *words]))


def rounded(thing: Any) -> Any:
    """All numbers to six digits."""
    if isinstance(thing, dict):
        return {key: rounded(value) for key, value in thing.items() if value is not None}
    return float(f"{thing:.6g}") if isinstance(thing, float) else thing


def entry(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one report."""
    environment = report["environment"]
    where = {"command": command(environment["command"]), "time": environment["time"]}
    if "experiment" in report:
        arms = EXPERIMENTS[report["experiment"]](report["data"])
    else:
        where |= {"seeds": report["plan"]["seeds"], "search_seeds": report["plan"]["search_seeds"]}
        arms = comparison(report)
    arms = {re.sub(r"[ ,]+", "-", name): found for name, found in arms.items()}
    return rounded(where | {"torch": environment["packages"]["torch"], "arms": arms})


def main() -> None:
    """Update results.json."""
    target = HERE / "results.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    for path in sorted(HERE.rglob("report.json")):
        results[str(path.parent.relative_to(HERE))] = entry(json.loads(path.read_text()))
    text = json.dumps(dict(sorted(results.items())), indent=1)
    # one metric on one line
    text = re.sub(r"[\[{][^{}\[\]]*[}\]]", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    target.write_text(text + "\n")


if __name__ == "__main__":
    main()
