"""Table 1 of the FAM paper: test accuracy of plain training, SAM and FAM on pictures.

Dropout and FAM with a finite radius stand beside them: what a change of the features gives at the same cost, and
the form of the penalty that does not vanish with confidence.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from relflat.lab.compare.arms import ARMS
from relflat.lab.compare.search import Plan, compare
from relflat.lab.compare.statistics import Difference, mean_sd
from relflat.lab.compare.trials import workers
from relflat.lab.data import fetch
from relflat.lab.report.formats import certainty, number, percent, points, settings_text
from relflat.lab.report.summary import Summary
from relflat.lab.report.verdict import at_the_edge, left_out, verdict
from relflat.lab.tasks.catalogue import task_named
from relflat.papers import training_study
from relflat.papers.experiment import Context, Figure, Outcome, Table
from relflat.papers.painting import by_arm, curves
from relflat.papers.sheets import Sheet
from relflat.papers.training_study import finished, numbers

SHEET = Sheet("table1")
PAPER: Mapping[str, Mapping[str, tuple[float, float]]] = SHEET["printed"]
GRIDS: Mapping[str, tuple[float, ...]] = SHEET["grids"]


class Part(NamedTuple):
    """One data set of the table: its names in the paper, to fetch and of the task, and what is trained on it."""

    title: str
    data: str
    task: str
    strength: float  # the paper's, used where settings are not searched for
    network: str


@dataclass(frozen=True)
class Size(training_study.Size):
    """What is run at one scale."""

    parts: tuple[Part, ...]
    search: bool  # settings are chosen on validation data from ``GRIDS``; else they are the paper's


SIZES = SHEET.sizes(lambda parts, **rest: Size(parts=tuple(Part(**part) for part in parts), **rest))


def plan_of(part: Part, size: Size) -> Plan:
    """The comparison on one data set; where nothing is searched for, each arm has the paper's one setting."""
    weight_decay = task_named(part.task).optimizer.weight_decay
    printed = {"plain": weight_decay, "fam-output": part.strength, **SHEET["usual"]}
    values = {name: grid if size.search else () for name, grid in GRIDS.items()}
    arms = tuple(replace(ARMS[name], values=own, usual=printed[name]) for name, own in values.items())
    return Plan(part.task, size.common, arms, (100,) if size.search else (), size.seeds)


def carry_out(part: Part, size: Size, context: Context) -> Summary:
    """Do what is missing of one data set's runs."""
    plan = plan_of(part, size)
    with workers(context.workers) as pool:
        found = compare(plan, context.runs, pool, context.counter(f"trainings on {part.title}", plan.runs))
    return Summary(found, costs={})  # steps are not timed here


def run(context: Context) -> Outcome:
    """Train every arm on every data set."""
    size = SIZES[context.scale]
    fetch.require(*(part.data for part in size.parts))
    found = [(part, carry_out(part, size, context)) for part in size.parts]
    return Outcome(
        findings=[line for part, summary in found for line in findings(part, summary)],
        tables=[table(part, summary) for part, summary in found],
        figures=[figure for part, summary in found for figure in figures(part, summary)],
        scaled=[f"{each.title}: {each.network}." for each in size.parts]
        + SHEET.differs(context.scale, **size.common),
        data={part.title: everything(part, summary) for part, summary in found},
    )


def findings(part: Part, summary: Summary) -> list[str]:
    """In words: what the paper has, what came out, and whether the one bears the other out."""
    comparison, pairs = summary.comparison, summary.against
    found = [f"{part.title}: {line}" for line in left_out(comparison)]
    found += [claim(part.title, name, pairs.get(ARMS[name].title)) for name in ("sam", "fam-output")]
    others = [pairs[ARMS[name].title] for name in ("fam-radius", "dropout") if ARMS[name].title in pairs]
    found += [f"{part.title}: {line}" for line in verdict(others, summary.metric)] if others else []
    edge = at_the_edge(comparison)
    return [*found, SHEET.say("edge", part=part.title, arms=", ".join(edge))] if edge else found


def claim(part: str, name: str, pair: Difference | None) -> str:
    """One arm's gain over plain training beside the paper's."""
    start = SHEET.say("claim", part=part, arm=ARMS[name].title, gain=printed_gain(part, name))
    if pair is None:
        return start + SHEET.say("none")
    result = "nothing" if not pair.shown else "gain" if pair.mean > 0 else "opposite"
    ours = SHEET.say(result, ours=f"{100 * pair.mean:+.1f} ({certainty(pair)})")
    return start + ours + ("" if pair.shown or pair.least_p < 0.05 else SHEET.say("few", n=pair.n))


def printed_gain(part: str, name: str) -> float:
    """The paper's difference to plain training."""
    return PAPER[part][name][0] - PAPER[part]["plain"][0]


def table(part: Part, summary: Summary) -> Table:
    """One data set: the paper's numbers and ours."""
    comparison, metric = summary.comparison, summary.metric
    places = (("test", "loss"), ("flatness", "value"), ("flatness", "confidence"))
    rows = []
    for arm in comparison.arms:
        trials = comparison.finals[arm.name]
        printed = PAPER[part.title].get(arm.name)
        row = (
            arm.title,
            "" if printed is None else f"{printed[0]:.2f} ± {printed[1]:g}",
            percent(mean_sd(numbers(trials, "test", metric.name))),
            points(summary.against.get(arm.title)),
            f"{len(finished(trials))} of {len(trials)}",
            *(number(mean_sd(numbers(trials, *place))) for place in places),
            settings_text(comparison.chosen[arm.name].settings),
        )
        rows.append(row)
    seeds = ", ".join(map(str, comparison.plan.seeds))
    return SHEET.table("scores", rows, part=part.title, metric=metric.title, network=part.network, seeds=seeds)


def figures(part: Part, summary: Summary) -> list[Figure]:
    """One data set: the arms seed by seed, and over the epochs."""
    metric, runs = summary.metric, summary.tested
    words = {"part": part.title, "metric": metric.title}
    plain, *others = runs
    gains = {
        title: [
            100 * (own.result["test"][metric.name] - base.result["test"][metric.name])
            for base, own in zip(runs[plain], runs[title], strict=True)
            if base.finished and own.finished
        ]
        for title in others
    }
    printed = {ARMS[name].title: printed_gain(part.title, name) for name in ("sam", "fam-output")}
    label = "test accuracy − plain, points"
    error = curves(runs, f"validation_{metric.name}", "validation error, %", error=True)
    return [
        SHEET.figure("differences", partial(by_arm, gains, label, printed=printed, first=1), **words),
        SHEET.figure("errors", error, **words),
    ]


def everything(part: Part, summary: Summary) -> dict[str, Any]:
    """All numbers behind one data set's table."""
    comparison = summary.comparison
    return {
        "task": part.task,
        "plan": asdict(comparison.plan),
        "paper": {arm: {"mean": mean, "sd": sd} for arm, (mean, sd) in PAPER[part.title].items()},
        "chosen": {name: dict(candidate.settings) for name, candidate in comparison.chosen.items()},
        "search": [
            {"arm": each.arm, "settings": dict(each.settings), "score": each.score} for each in comparison.candidates
        ],
        "tested": {name: [trial.tested for trial in trials] for name, trials in comparison.finals.items()},
        "differences": [asdict(pair) for pair in summary.differences],
    }
