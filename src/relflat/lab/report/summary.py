"""The numbers of a comparison that its report shows: a row for each arm, and the differences between them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from relflat.lab.compare.arms import Arm, Values
from relflat.lab.compare.search import Candidate, Comparison
from relflat.lab.compare.statistics import Difference, differences, mean_sd
from relflat.lab.compare.trials import Trial
from relflat.lab.report.document import Table
from relflat.lab.report.formats import NONE, MeanSd, number, percent, points, settings_text
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.tasks.metrics import Metric
from relflat.lab.train.timing import StepCost

Number = Callable[[Mapping[str, Any]], float | None]  # of a run's result


@dataclass(frozen=True)
class Row:
    """One arm's line in the table; pairs are (mean, sd) over the tested runs, nan where there is none."""

    arm: str
    title: str
    settings: Values  # chosen on validation data
    n: int  # tested runs that finished
    diverged: int  # tested runs that did not
    score: MeanSd  # the task's metric on the test split
    loss: MeanSd  # on the test split
    ece: MeanSd  # expected calibration error on the test split
    equal_time: MeanSd  # the metric on validation data at the moment when the first arm's training was over
    shifts: Mapping[str, MeanSd]  # the metric on further test sets, by name
    kappa: MeanSd  # of the task's layer on the training data, after training
    kappa_before: MeanSd  # the same before training; older versions did not measure it
    confidence: MeanSd  # mean of the largest probability on the training data
    weight_norm: MeanSd  # of the task's layer
    cost: StepCost  # seconds a step


@dataclass(frozen=True)
class Summary:
    """A comparison with the numbers that every form of its report is made from; each is computed once."""

    comparison: Comparison
    costs: Mapping[str, StepCost]  # of a step, by name of the arm

    @cached_property
    def metric(self) -> Metric:
        """What the task is judged by."""
        return task_named(self.comparison.plan.task).metric

    @cached_property
    def rows(self) -> list[Row]:
        """One for each arm."""
        return [row(self, arm) for arm in self.comparison.arms]

    @cached_property
    def differences(self) -> list[Difference]:
        """Of the metric on test data, each other arm to the first, over the seeds on which every arm finished."""
        metric = self.metric.name
        return paired(self.comparison, lambda result: float(result["test"][metric]))

    @property
    def against(self) -> dict[str, Difference]:
        """The same by title of the other arm."""
        return {pair.second: pair for pair in self.differences}

    @cached_property
    def untuned(self) -> "Summary | None":
        """The second table."""
        found = self.comparison.untuned
        return None if found is None else Summary(found, self.costs)

    @property
    def tables(self) -> list["Summary"]:
        """This table, and the second one if there is one."""
        return [self] if self.untuned is None else [self, self.untuned]

    @property
    def kind(self) -> str:
        """Which table this is."""
        return "untuned" if self.comparison.plan.untuned else "tuned"

    @cached_property
    def tested(self) -> dict[str, Sequence[Trial]]:
        """The tested runs of each arm, by title."""
        return {arm.title: self.comparison.finals[arm.name] for arm in self.comparison.arms}

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """Of all tested runs that finished."""
        return [trial.result for trials in self.tested.values() for trial in trials if trial.finished]

    @property
    def tried(self) -> dict[str, list[Candidate]]:
        """The settings that were tried for each arm, by title."""
        arms, candidates = self.comparison.arms, self.comparison.candidates
        return {arm.title: [each for each in candidates if each.arm == arm.name] for arm in arms}


def row(summary: Summary, arm: Arm) -> Row:
    """Summarise the tested runs of one arm."""
    comparison, metric, cost = summary.comparison, summary.metric.name, summary.costs[arm.name]
    trials = comparison.finals[arm.name]
    done = [trial for trial in trials if trial.finished]

    def over_seeds(part: str, key: str) -> MeanSd:
        return mean_sd([trial.result[part].get(key) for trial in done])

    return Row(
        arm=arm.name,
        title=arm.title,
        settings=comparison.chosen[arm.name].settings,
        n=len(done),
        diverged=len(trials) - len(done),
        score=over_seeds("test", metric),
        loss=over_seeds("test", "loss"),
        ece=over_seeds("test", "ece"),
        equal_time=mean_sd([at_equal_time(trial, cost, metric) for trial in done]),
        shifts={
            name: mean_sd([elsewhere(trial.result, "shifts", name, metric) for trial in done])
            for name in (done[0].result.get("shifts", {}) if done else {})
        },
        kappa=over_seeds("flatness", "value"),
        kappa_before=mean_sd([trial.result.get("kappa_before") for trial in done]),
        confidence=over_seeds("flatness", "confidence"),
        weight_norm=over_seeds("flatness", "weight_norm"),
        cost=cost,
    )


def at_equal_time(trial: Trial, cost: StepCost, metric: str) -> float:
    """The metric on validation data after the last epoch that was over when the first arm had done all of its steps.

    A ratio within the noise of timing, below 1.1, counts as 1.
    """
    share = 1.0 if cost.ratio < 1.1 else 1 / cost.ratio
    last = max(1, int(share * len(trial.history) + 1e-9))
    found = trial.history[last - 1][f"validation_{metric}"]
    return math.nan if found is None else float(found)


def test_confidence(result: Mapping[str, Any]) -> float | None:
    """Mean confidence of a run on the test split, out of its bins; None where the task has none."""
    bins = result["test"].get("bins")
    return None if bins is None else sum(share * confidence for share, confidence, _ in bins)


def elsewhere(result: Mapping[str, Any], part: str, name: str, metric: str) -> float | None:
    """The metric of a run on a further test set: shifted, or corrupted (mean of its severities); None without it."""
    found = result.get(part, {}).get(name)
    values = [each[metric] for each in (found if isinstance(found, list) else [found] if found else [])]
    return None if not values or None in values else sum(values) / len(values)


def paired(comparison: Comparison, number: Number) -> list[Difference]:
    """Paired differences to the first arm; nothing where a run lacks the number, or every seed has a diverged run."""
    by_seed = zip(*(comparison.finals[arm.name] for arm in comparison.arms), strict=True)
    whole = [[number(run.result) for run in runs] for runs in by_seed if all(run.finished for run in runs)]
    if not whole or any(value is None for values in whole for value in values):
        return []
    return differences({arm.title: own for arm, own in zip(comparison.arms, zip(*whole, strict=True), strict=True)})


def table(summary: Summary, where: str = "h") -> Table:
    """The arms' table of the page, or "t" and "p" a narrower one, without numbers that the task does not have."""
    done = summary.results
    absent = {"ECE, %", "confidence"} if done and "ece" not in done[0]["test"] else set()
    if not any("kappa_before" in result for result in done):
        absent.add("kappa before")
    lines = [
        [cell for cell in cells(summary, line) if where in cell[1] and cell[0] not in absent] for line in summary.rows
    ]
    headings, _, _ = zip(*lines[0], strict=True)
    return Table(f"Results, {summary.kind}", headings, [[text for _, _, text in line] for line in lines])


def cells(summary: Summary, line: Row) -> list[tuple[str, str, str]]:
    """A row of the tables: heading, the table that has it (page, terminal, paper), and the text."""
    title = summary.metric.title
    shifts = dict.fromkeys(name for row in summary.rows for name in row.shifts)
    lost = f" (+{line.diverged} diverged)" if line.diverged else ""
    return [
        ("arm", "htp", line.title),
        (f"test {title}, %", "htp", percent(line.score)),
        ("difference, points", "hp", points(summary.against.get(line.title))),
        ("n", "htp", f"{line.n}{lost}"),
        ("test loss", "p", number(line.loss)),
        *((f"on {name}, %", "p", percent(line.shifts[name]) if name in line.shifts else "") for name in shifts),
        ("ECE, %", "p", percent(line.ece)),
        ("validation at equal time, %", "h", percent(line.equal_time)),
        ("kappa", "htp", number(line.kappa)),
        ("kappa before", "h", number(line.kappa_before)),
        ("confidence", "ht", number(line.confidence)),
        ("||W||", "ht", number(line.weight_norm)),
        ("step", "htp", f"{line.cost.ratio:.2f}x"),
        ("setting", "h", chosen(summary, line)),
    ]


def chosen(summary: Summary, line: Row) -> str:
    """The setting of an arm, and whether it was searched where others were."""
    searched = summary.comparison.chosen[line.arm].trials or summary.comparison.plan.untuned
    return (settings_text(line.settings) or "the task's own") + ("" if searched else ", not searched")


def beyond_accuracy(summary: Summary) -> Table:
    """What else the test split shows: mean and deviation of each arm, and its difference to the first arm."""
    results, metric = summary.results, summary.metric.name
    shifts, corrupted = (
        dict.fromkeys(n for r in results for n in r.get(part, ())) for part in ("shifts", "corrupted")
    )
    numbers: dict[str, Number] = {
        "test loss": lambda result: result["test"]["loss"],
        "ECE, %": lambda result: result["test"].get("ece"),
        "confidence, %": test_confidence,
        **{f"on {name}, %": partial(elsewhere, part="shifts", name=name, metric=metric) for name in shifts},
        **{f"{name}, %": partial(elsewhere, part="corrupted", name=name, metric=metric) for name in corrupted},
    }
    columns = {title: column(summary, of, share="%" in title) for title, of in numbers.items()}
    columns = {title: cells for title, cells in columns.items() if any(cell != NONE for cell in cells)}
    rows = list(zip(summary.tested, *columns.values(), strict=True))
    return Table(f"Beyond accuracy, {summary.kind}", ("arm", *columns), rows)


def column(summary: Summary, of: Number, *, share: bool) -> list[str]:
    """One number of the arms, in percent or as it is."""
    against = {pair.second: pair for pair in paired(summary.comparison, of)}
    cells = []
    for title, trials in summary.tested.items():
        own = mean_sd([of(trial.result) for trial in trials if trial.finished])
        difference = points(against.get(title), *((100, ".1f") if share else (1, ".3f")))
        cells.append((percent(own) if share else number(own)) + (f"\n{difference}" if difference else ""))
    return cells
