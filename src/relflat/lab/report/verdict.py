"""What a comparison shows, in plain sentences."""

from collections.abc import Iterator, Mapping, Sequence

from relflat.lab.compare.search import Comparison
from relflat.lab.compare.statistics import LEVEL, Difference, seeds_needed
from relflat.lab.report.formats import certainty, named
from relflat.lab.report.summary import Summary
from relflat.lab.tasks.metrics import ACCURACY, Metric
from relflat.lab.train.timing import StepCost


def findings(summary: Summary) -> list[str]:
    """The verdict, then what else one should know before believing the table."""
    costs = {line.title: line.cost for line in summary.rows}
    said = [line for each in summary.tables for line in judgement(each, costs)]
    return [*left_out(summary.comparison), *said, *remarks(summary)]


def judgement(summary: Summary, costs: Mapping[str, StepCost] | None = None) -> list[str]:
    """The verdict of one table, where it has more than one arm; each sentence says which table it speaks of."""
    if len(summary.rows) == 1:
        said = [f"Nothing can be compared: only {summary.rows[0].title} is left."]
    else:
        said = verdict(summary.differences, summary.metric, costs)
    return [f"{summary.kind.capitalize()}: {line}" for line in said]


def left_out(comparison: Comparison) -> list[str]:
    """A sentence on each arm that cannot run on the task."""
    names = {arm.name: named(arm.title, arm.name) for arm in comparison.plan.arms}
    return [
        f"{names[arm]} cannot run on this task and is left out: {' '.join(reason.split())}"
        for arm, reason in comparison.failed.items()
    ]


def verdict(
    pairs: Sequence[Difference], metric: Metric = ACCURACY, costs: Mapping[str, StepCost] | None = None
) -> list[str]:
    """Say in plain English what the differences show, one sentence a pair; first, whether so few seeds can.

    Costs are those of a step, by title of the arm, where they are known.
    """
    if not pairs:
        return ["Nothing can be compared: on every seed some arm diverged."]
    found = [sentence(pair, metric, (costs or {}).get(pair.second)) for pair in pairs]
    if any(pair.least_p < LEVEL for pair in pairs):
        return found
    seeds = "1 seed" if pairs[0].n == 1 else f"{pairs[0].n} seeds"
    needed = seeds_needed(len(pairs))
    none = f"With {seeds} this test can show nothing, whatever comes out"
    return [f"{none}; it takes at least {needed}: --seeds {needed}.", *found]


def sentence(pair: Difference, metric: Metric, cost: StepCost | None) -> str:
    """What one difference shows, and at what cost if that is known."""
    detail = f"{100 * pair.mean:+.1f} points of test {metric.title} ({certainty(pair)})"
    if cost:
        detail += f", at {cost.ratio:.2f}x the step"
    if pair.shown:
        return f"{pair.second} is {'better' if pair.mean > 0 else 'worse'} than {pair.first}: {detail}."
    if not pair.low <= 0 <= pair.high:
        why = "BCa intervals are too narrow with few seeds, so" if pair.n < 10 else "the interval leaves out 0, but"
        detail += f"; {why} p decides"
    return f"{pair.second} against {pair.first}: no difference shown, {detail}."


def remarks(summary: Summary) -> Iterator[str]:
    """What else a reader should know before believing the table."""
    comparison = summary.comparison
    if any(line.n for line in summary.rows):
        yield flattest(summary)
    if edge := at_the_edge(comparison):
        titles = ", ".join(edge)
        yield f"The best setting lies at the end of what was tried for {titles}: more of them might do better there."
    if any("radius" in line.settings for line in summary.rows):
        yield "The radius arm adds noise to the features, scaled by their norm; it lowers kappa only by way of that."
    if lost := sum(candidate.diverged for candidate in comparison.candidates):
        without = [arm.title for arm in comparison.arms if comparison.chosen[arm.name].diverged]
        then = "their settings were not chosen"
        if without:
            then = f"of {', '.join(without)} there was no setting without, and the first was tested"
        yield f"{lost} {'trial' if lost == 1 else 'trials'} of the search diverged; {then}."


def flattest(summary: Summary) -> str:
    """Whether the flattest arm is the best one."""
    done = [line for line in summary.rows if line.n]
    lowest = min(done, key=lambda line: line.kappa[0])
    best = max(done, key=lambda line: line.score[0])
    agree, other = ("is also", "") if lowest.score[0] == best.score[0] else ("is not", f", {best.title}")
    return (
        f"The arm with the lowest kappa, {lowest.title}, {agree} the one with the highest mean test "
        f"{summary.metric.title}{other}."
    )


def at_the_edge(comparison: Comparison) -> list[str]:
    """Titles of the arms whose chosen setting is the first or last of those that were tried."""
    found = []
    for arm in comparison.arms:
        best, own = comparison.chosen[arm.name], [each for each in comparison.candidates if each.arm == arm.name]
        if len(arm.values) > 2 and not best.diverged and (best is own[0] or best is own[-1]):
            found.append(arm.title)
    return found
