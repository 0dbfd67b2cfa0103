"""What a comparison says, as numbers and as plain sentences; printed on the terminal and in the report."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from relflat.lab.compare.arms import Values
from relflat.lab.compare.search import Comparison
from relflat.lab.compare.statistics import LEVEL, Difference, differences, mean_sd, seeds_needed
from relflat.lab.compare.trials import Trial
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.train.evaluate import ACCURACY, Metric
from relflat.lab.train.timing import StepCost

MeanSd = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One arm's line in the table; pairs are (mean, sd) over the tested runs.

    Attributes:
        arm: its name.
        title: as it is shown.
        settings: what was chosen on validation data.
        n: number of tested runs that finished.
        diverged: number that did not.
        score: the task's metric on the test split.
        loss: on the test split.
        ece: expected calibration error on the test split; nan where the task has none.
        equal_time: the metric on validation data at the moment when the first arm's training was over.
        shifts: the metric on further test sets, by name.
        kappa: of the task's layer on the training data, after training.
        kappa_before: the same before training; nan where an older version did not measure it.
        confidence: mean of the largest probability on the training data; nan where there are none.
        weight_norm: of the task's layer.
        cost: seconds a step.
    """

    arm: str
    title: str
    settings: Values
    n: int
    diverged: int
    score: MeanSd
    loss: MeanSd
    ece: MeanSd
    equal_time: MeanSd
    shifts: Mapping[str, MeanSd]
    kappa: MeanSd
    kappa_before: MeanSd
    confidence: MeanSd
    weight_norm: MeanSd
    cost: StepCost


def rows(comparison: Comparison, costs: Mapping[str, StepCost]) -> list[Row]:
    """Summarise the tested runs of each arm.

    Args:
        comparison: what came out.
        costs: of a step, by name of the arm.
    """
    return [
        row(
            arm.name,
            arm.title,
            comparison.chosen[arm.name].settings,
            comparison.finals[arm.name],
            costs[arm.name],
            metric_of(comparison).name,
        )
        for arm in comparison.plan.arms
    ]


def metric_of(comparison: Comparison) -> Metric:
    """What the comparison's task is judged by."""
    return task_named(comparison.plan.task).metric


def row(arm: str, title: str, settings: Values, trials: Sequence[Trial], cost: StepCost, metric: str) -> Row:
    """Summarise the tested runs of one arm."""
    done = [trial for trial in trials if trial.finished]

    def over_seeds(part: str, key: str) -> MeanSd:
        values = [trial.result[part].get(key) for trial in done]
        return spread([math.nan if value is None else value for value in values])

    return Row(
        arm=arm,
        title=title,
        settings=settings,
        n=len(done),
        diverged=len(trials) - len(done),
        score=over_seeds("test", metric),
        loss=over_seeds("test", "loss"),
        ece=over_seeds("test", "ece"),
        equal_time=spread([at_equal_time(trial, cost, metric) for trial in done]),
        shifts={
            name: spread([trial.result["shifts"][name][metric] for trial in done])
            for name in (done[0].result.get("shifts", {}) if done else {})
        },
        kappa=over_seeds("flatness", "value"),
        kappa_before=spread([trial.result.get("kappa_before", math.nan) for trial in done]),
        confidence=over_seeds("flatness", "confidence"),
        weight_norm=over_seeds("flatness", "weight_norm"),
        cost=cost,
    )


def spread(values: Sequence[float]) -> MeanSd:
    """Mean and deviation; nan without values, or where one of them is not known."""
    known = values and not any(math.isnan(value) for value in values)
    return mean_sd(values) if known else (math.nan, math.nan)


def at_equal_time(trial: Trial, cost: StepCost, metric: str) -> float:
    """The metric on validation data after the last epoch that was over when the first arm had done all of its steps.

    A ratio within the noise of timing, below 1.1, counts as 1.
    """
    history = trial.history
    share = 1.0 if cost.ratio < 1.1 else 1 / cost.ratio
    last = max(1, int(share * len(history) + 1e-9))
    return float(history[last - 1][f"validation_{metric}"])


def score_differences(comparison: Comparison) -> list[Difference]:
    """Paired differences of the metric on test data to the first arm, over the seeds on which every arm finished."""
    metric = metric_of(comparison).name
    whole = [
        place
        for place in range(len(comparison.plan.seeds))
        if all(trials[place].finished for trials in comparison.finals.values())
    ]
    if not whole:
        return []
    return differences(
        {
            arm.title: [comparison.finals[arm.name][place].result["test"][metric] for place in whole]
            for arm in comparison.plan.arms
        }
    )


def verdict(
    pairs: Sequence[Difference], metric: Metric = ACCURACY, costs: Mapping[str, StepCost] | None = None
) -> list[str]:
    """Say in plain English what the differences show, one sentence a pair; first, whether so few seeds can.

    Args:
        pairs: what came out.
        metric: what the task is judged by.
        costs: of a step, by title of the arm, where they are known.
    """
    if not pairs:
        return ["Nothing can be compared: on every seed some arm diverged."]
    found = [sentence(pair, metric, (costs or {}).get(pair.second)) for pair in pairs]
    if all(pair.least_p >= LEVEL for pair in pairs):
        seeds = "1 seed" if pairs[0].n == 1 else f"{pairs[0].n} seeds"
        found.insert(
            0,
            f"With {seeds} this test can show nothing, whatever comes out; "
            f"it takes at least {seeds_needed(len(pairs))}: --seeds {seeds_needed(len(pairs))}.",
        )
    return found


def sentence(pair: Difference, metric: Metric, cost: StepCost | None = None) -> str:
    """What one difference shows, and at what cost if that is known."""
    points = f"{100 * pair.mean:+.1f} points of test {metric.title}"
    detail = f"{points} ({certainty(pair)})" + (f", at {cost_text(cost)} the step" if cost else "")
    if pair.shown:
        return f"{pair.second} is {'better' if pair.mean > 0 else 'worse'} than {pair.first}: {detail}."
    return f"{pair.second} against {pair.first}: no difference shown, {detail}{disagreement(pair)}."


def disagreement(pair: Difference) -> str:
    """Why no difference is shown although the interval leaves out 0; nothing where it holds it."""
    if pair.low <= 0 <= pair.high:
        return ""
    if pair.n < 10:
        return "; BCa intervals are too narrow with few seeds, so p decides"
    return "; the interval leaves out 0, but p decides"


def certainty(pair: Difference) -> str:
    """Interval, p and n of a difference, or why there are none."""
    if pair.n == 1:
        return "n = 1: no spread"
    return f"interval {interval(pair)}, p = {pair.p:.2g}, {pair.n} seeds"


def interval(pair: Difference) -> str:
    """Its two ends, in percentage points."""
    return f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"


def remarks(comparison: Comparison, lines: Sequence[Row]) -> list[str]:
    """What else a reader should know before believing the table."""
    found = []
    done = [line for line in lines if line.n]
    if done:
        flattest = min(done, key=lambda line: line.kappa[0])
        best = max(done, key=lambda line: line.score[0])
        agree = "is also" if flattest is best else "is not"
        found.append(
            f"The arm with the lowest kappa, {flattest.title}, {agree} the one with the highest mean test "
            f"{metric_of(comparison).title}{'' if flattest is best else f', {best.title}'}."
        )
    edge = at_the_edge(comparison)
    if edge:
        found.append(
            f"The best setting lies at the end of its grid for {', '.join(edge)}: a wider grid might do better there."
        )
    if any("radius" in comparison.chosen[arm.name].settings for arm in comparison.plan.arms):
        found.append(
            "The radius arm adds noise to the features, scaled by their norm; it lowers kappa only by way of that."
        )
    lost = sum(candidate.diverged for candidate in comparison.candidates)
    without = [arm.title for arm in comparison.plan.arms if comparison.chosen[arm.name].diverged]
    if lost:
        found.append(
            f"{lost} {'trial' if lost == 1 else 'trials'} of the search diverged; "
            + (
                f"of {', '.join(without)} there was no setting without, and the first was tested."
                if without
                else "their settings were not chosen."
            )
        )
    return found


def at_the_edge(comparison: Comparison) -> list[str]:
    """Titles of the arms whose chosen setting is the first or last of its grid."""
    return [
        arm.title
        for arm in comparison.plan.arms
        if len(arm.values) > 2
        and not comparison.chosen[arm.name].diverged
        and comparison.chosen[arm.name].settings[arm.key] in (arm.values[0], arm.values[-1])
    ]


def sweeps(comparison: Comparison) -> dict[str, list[float]]:
    """Mean validation score of each setting, by title of the arm; nan where a trial diverged."""
    return {
        arm.title: [
            math.nan if candidate.diverged else candidate.score
            for candidate in comparison.candidates
            if candidate.arm == arm.name
        ]
        for arm in comparison.plan.arms
    }


def merged_bins(trials: Sequence[Trial]) -> list[tuple[float, float, float]]:
    """Calibration bins of several runs' test splits as one: by tenths of confidence."""
    table: dict[int, list[tuple[float, float, float]]] = {}
    for trial in trials:
        if trial.finished:
            for share, confidence, right in trial.result["test"].get("bins", ()):
                table.setdefault(min(9, int(10 * confidence)), []).append((share, confidence, right))
    merged = []
    for _, parts in sorted(table.items()):
        weight = sum(share for share, _, _ in parts)
        merged.append(
            (
                weight,
                sum(share * confidence for share, confidence, _ in parts) / weight,
                sum(share * right for share, _, right in parts) / weight,
            )
        )
    return merged


def noise_share(comparison: Comparison) -> float:
    """Mean share of the training labels that label noise really changed."""
    return fmean(
        trial.result["label_noise_changed"] for trials in comparison.finals.values() for trial in trials
    )


def named(title: str, name: str) -> str:
    """An arm's title, followed by its name on the command line where one does not tell the other."""
    return title if title.lower().replace(" ", "-") == name else f"{title} ({name})"


def settings_text(settings: Values) -> str:
    """Settings as people write them on the command line, without the dashes."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
    )


NONE = "–"  # in place of a number that there is none of


def finite(value: float, form: str) -> str:
    """The number in this format, or a dash where it is infinite or not known."""
    return format(value, form) if math.isfinite(value) else NONE


def percent(pair: MeanSd) -> str:
    """Mean and deviation of a share, in percent; the mean alone where one value has no deviation."""
    mean, sd = pair
    return finite(100 * mean, ".1f") + (f" ± {100 * sd:.1f}" if math.isfinite(sd) else "")


def number(pair: MeanSd) -> str:
    """Mean and deviation: one significant digit of the deviation, and as many decimals of the mean."""
    mean, sd = pair
    if not (math.isfinite(sd) and sd > 0):
        return finite(mean, ".3g") + (" ± 0" if sd == 0 else "")
    decimals = max(0, -math.floor(math.log10(sd)))
    return f"{mean:.{decimals}f} ± {sd:.{decimals}f}"


def cost_text(cost: StepCost) -> str:
    """Cost of a step relative to the first arm."""
    return f"{cost.ratio:.2f}x"


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        heading: above it.
        cell: an arm's text in it.
        where: the narrower tables that have it too: ``"t"`` the terminal's, ``"p"`` a paper's.
    """

    heading: str
    cell: Callable[[Row], str]
    where: str = ""


def columns(comparison: Comparison, where: str = "") -> list[Column]:
    """The columns of a comparison's table; those of numbers that its task does not have are left out.

    Args:
        comparison: what is shown.
        where: only the columns of this narrower table; all of them by default.
    """
    title = metric_of(comparison).title
    done = [trial.result for trials in comparison.finals.values() for trial in trials if trial.finished]
    shifts = list(done[0].get("shifts", {})) if done else []
    known = any("kappa_before" in result for result in done)
    against = {pair.second: pair for pair in score_differences(comparison)}
    probabilities = not done or "ece" in done[0]["test"]
    found = [
        Column("arm", lambda line: line.title, "tp"),
        Column(f"test {title}, %", lambda line: percent(line.score), "tp"),
        Column("difference, points", lambda line: points(against.get(line.title)), "p"),
        Column(
            "n", lambda line: str(line.n) + (f" (+{line.diverged} diverged)" if line.diverged else ""), "tp"
        ),
        Column("test loss", lambda line: number(line.loss), "p"),
        *(Column(f"on {name}, %", partial(shifted, name), "p") for name in shifts),
        *([Column("ECE, %", lambda line: percent(line.ece), "p")] if probabilities else []),
        Column("validation at equal time, %", lambda line: percent(line.equal_time)),
        Column("kappa", lambda line: number(line.kappa), "tp"),
        *([Column("kappa before", lambda line: number(line.kappa_before))] if known else []),
        *([Column("confidence", lambda line: number(line.confidence), "t")] if probabilities else []),
        Column("||W||", lambda line: number(line.weight_norm), "t"),
        Column("step", lambda line: cost_text(line.cost), "tp"),
        Column("chosen on validation", lambda line: settings_text(line.settings)),
    ]
    return [column for column in found if not where or where in column.where]


def points(pair: Difference | None) -> str:
    """The mean paired difference to the first arm with its interval, in percentage points."""
    if pair is None:
        return ""
    return f"{100 * pair.mean:+.1f} ({'n = 1' if pair.n == 1 else interval(pair)})"


def shifted(name: str, line: Row) -> str:
    """The metric on a further test set."""
    return percent(line.shifts[name]) if name in line.shifts else ""


def headings(columns: Sequence[Column]) -> list[str]:
    """The first line of the table."""
    return [column.heading for column in columns]


def cells(line: Row, columns: Sequence[Column]) -> list[str]:
    """A row of the table as text."""
    return [column.cell(line) for column in columns]
