"""The figures of a comparison's report.

To add one, write a function from the comparison's summary to a `Figure` and mark it with `register`; it returns None
where there is nothing to draw. The report shows the figures in the order of this file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau

from relflat.lab.compare.trials import Trial
from relflat.lab.report.document import Figure
from relflat.lab.report.drawing import cloud, curves, legend, marks, points
from relflat.lab.report.summary import Summary
from relflat.plot.style import PALETTE

Pairs = tuple[list[float], list[float]]
Make = Callable[[Summary], Figure | None]
FIGURES: list[Make] = []


def register(make: Make) -> Make:
    """Add a figure to the report."""
    FIGURES.append(make)
    return make


def figures(summary: Summary) -> list[Figure]:
    """All figures of the report."""
    return [figure for make in FIGURES if (figure := make(summary)) is not None]


def gain_against_cost(summary: Summary) -> Figure | None:
    """What each arm buys, and what its steps cost: the first figure, below the verdict; None without a pair."""
    first, metric = summary.comparison.arms[0].title, summary.metric.title

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=PALETTE["lines"][0], linewidth=1)
        for place, arm in enumerate(summary.comparison.arms):
            pair, look, cost = summary.against.get(arm.title), marks(place), summary.costs[arm.name].ratio
            if pair is None:
                cloud(axes, [cost], [0], place, arm.title)
                continue
            low, up, high = (100 * x for x in (pair.low, pair.mean, pair.high))
            hollow = {} if pair.shown else {"markerfacecolor": "none", "markeredgewidth": 1.2}
            beside = [[max(0.0, up - low)], [max(0.0, high - up)]]
            axes.errorbar(cost, up, beside, label=arm.title, markersize=7, linestyle="", **look | hollow)
        axes.set(xlabel=f"time of a step, {first} = 1", ylabel=f"gain over {first}, points of {metric}")
        legend(axes)

    caption = "Up is better, left is cheaper. Line: 95 % interval; filled: the difference is shown (p < .05)."
    return Figure(f"Gain against cost, {summary.kind}", paint, caption) if summary.differences else None


@register
def validation_by_epoch(summary: Summary) -> Figure:
    """Learning curves on validation data."""
    caption = (
        f"{summary.metric.error.capitalize()} on up to 1,000 validation samples, targets as published. Line: mean "
        "over the tested seeds; band: their range."
    )
    return error_curves(summary, "validation", "Validation", caption)


@register
def validation_by_time(summary: Summary) -> Figure:
    """The same curves, with what a step costs."""
    seconds = {arm.title: summary.costs[arm.name].seconds for arm in summary.comparison.arms}
    caption = "The same against steps times the median seconds of a step."
    return error_curves(summary, "validation", "Validation", caption, seconds)


@register
def training_by_epoch(summary: Summary) -> Figure:
    """Learning curves on training data."""
    runs = [trial for trials in summary.tested.values() for trial in trials]
    noise = np.mean([trial.result["label_noise_changed"] for trial in runs])
    wrong = f"{100 * noise:.0f} % of them are wrong; an error well below that means they were memorised."
    caption = f"{summary.metric.error.capitalize()} on the training samples as given. "
    return error_curves(summary, "train", "Training", caption + (wrong if noise else "None were changed."))


def error_curves(
    summary: Summary, split: str, title: str, caption: str, seconds: Mapping[str, float] | None = None
) -> Figure:
    """The error on a split by epoch, or by time where a step's seconds are given."""
    key, label = f"{split}_{summary.metric.name}", f"{title.lower()} {summary.metric.error}, %"
    by = "epoch" if seconds is None else "training time"
    paint = curves(summary.tested, key, label, error=True, seconds=seconds)
    return Figure(f"{title} {summary.metric.error} by {by}", paint, caption)


@register
def kappa_by_epoch(summary: Summary) -> Figure:
    """How flatness develops."""
    caption = "Relative flatness of the task's layer on the training data."
    return Figure("Kappa by epoch", curves(summary.tested, "kappa", "kappa"), caption)


@register
def kappa_against_test(summary: Summary) -> Figure:
    """Whether flatter runs are better."""
    error, metric = summary.metric.error, summary.metric.name
    found = kappas(summary.tested, lambda result: 100 * (1 - result["test"][metric]))
    return Figure(
        f"Kappa against test {error}",
        points(found, ("kappa, training data", f"test {error}, %"), log=True),
        "Each point is one tested run.",
    )


@register
def kappa_against_gap(summary: Summary) -> Figure | None:
    """Whether flatter trials of the search generalise better, and their rank correlation; None without a search."""
    searched = {title: [trial for each in tried for trial in each.trials] for title, tried in summary.tried.items()}
    if not any(searched.values()):
        return None
    found = kappas(searched, lambda result: result["validation"]["loss"] - result["train"]["loss"])
    one, other = ([value for pairs in found.values() for value in pairs[k]] for k in (0, 1))
    # Ranks, as Jiang et al. (2020, https://arxiv.org/abs/1912.02178) compare measures with the gap: kappa spans
    # orders of magnitude, and nothing says that the gap grows linearly with it.
    tau = kendalltau(one, other).statistic if len(one) > 2 else math.nan
    known = math.isfinite(tau)  # not where all values of one are the same
    correlation = f" Rank correlation (Kendall's tau) {tau:+.2f} over {len(one)} trials." if known else ""
    return Figure(
        "Kappa against generalisation gap",
        points(found, ("kappa, training data", "validation loss − training loss"), log=True),
        f"Each point is one trial of the search.{correlation}",
    )


@register
def validation_by_setting(summary: Summary) -> Figure | None:
    """What the search saw; None without one."""
    error, groups = summary.metric.error, {}
    if not any(each.trials for tried in summary.tried.values() for each in tried):
        return None
    for title, tried in summary.tried.items():
        errors = [math.nan if each.diverged else 100 * (1 - each.score) for each in tried]
        groups[title] = ([] if all(map(math.isnan, errors)) else range(1, len(errors) + 1), errors)

    def paint(axes: Axes) -> None:
        points(groups, ("place in the arm's grid", f"validation {error}, %"), joined=True)(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    caption = "Mean over the search seeds, from the first value of each arm's grid to the last."
    return Figure(f"Validation {error} by setting", paint, caption)


@register
def calibration(summary: Summary) -> Figure | None:
    """Whether the networks are as sure as they are right; None where the task has no probabilities."""
    bins = {title: merged_bins(trials) for title, trials in summary.tested.items()}
    if not any(bins.values()):
        return None
    groups = {title: ([x for _, x, _ in own], [y for _, _, y in own]) for title, own in bins.items()}

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=PALETTE["lines"][0], linewidth=1)
        points(groups, ("confidence", "share that is right, test"), joined=True)(axes)

    caption = "Above the line: right more often than the network believes. All tested runs together."
    return Figure("Calibration on test data", paint, caption)


def kappas(groups: Mapping[str, Sequence[Trial]], other: Callable[[Mapping[str, Any]], float]) -> dict[str, Pairs]:
    """Kappa and another number of each finished run's result, by title of the arm."""
    done = {title: [run.result for run in runs if run.finished] for title, runs in groups.items()}
    return {
        title: ([result["flatness"]["value"] for result in results], [other(result) for result in results])
        for title, results in done.items()
    }


def merged_bins(trials: Sequence[Trial]) -> list[tuple[float, float, float]]:
    """Share of the samples, confidence and accuracy of several runs' test splits, by tenths of confidence."""
    found = [one for trial in trials if trial.finished for one in trial.result["test"].get("bins", ())]
    bins = np.reshape(found, (-1, 3))
    tenths = np.minimum(9, np.floor(10 * bins[:, 1]))
    groups = [bins[tenths == tenth] for tenth in np.unique(tenths)]
    return [(own[:, 0].sum(), *np.average(own[:, 1:], axis=0, weights=own[:, 0])) for own in groups]
