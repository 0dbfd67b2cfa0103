"""The figures of a comparison's report.

To add one, write a function from the comparison's summary to a `Figure` and mark it with `register`; it returns None
where there is nothing to draw. The report shows the figures in the order of this file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau

from relflat.lab.compare.trials import Trial
from relflat.lab.report.document import Figure
from relflat.lab.report.drawing import LINES, Paint, curves, error_of, points
from relflat.lab.report.summary import Summary

Bin = tuple[float, float, float]  # share of the samples, confidence, accuracy
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


@register
def validation_by_epoch(summary: Summary) -> Figure:
    """Learning curves on validation data."""
    return Figure(
        f"Validation {summary.metric.error} by epoch",
        error_curves(summary, "validation", "validation"),
        f"{summary.metric.error.capitalize()} on up to 1,000 validation samples, targets as published. Line: mean "
        "over the tested seeds; band: their range.",
    )


@register
def validation_by_time(summary: Summary) -> Figure:
    """The same curves, with what a step costs."""
    seconds = {arm.title: summary.costs[arm.name].seconds for arm in summary.comparison.plan.arms}
    return Figure(
        f"Validation {summary.metric.error} by training time",
        error_curves(summary, "validation", "validation", seconds),
        "The same against steps times the median seconds of a step.",
    )


@register
def training_by_epoch(summary: Summary) -> Figure:
    """Learning curves on training data."""
    runs = [trial for trials in summary.tested.values() for trial in trials]
    noise = np.mean([trial.result["label_noise_changed"] for trial in runs])
    wrong = f"{100 * noise:.0f} % of them are wrong; an error well below that means they were memorised."
    return Figure(
        f"Training {summary.metric.error} by epoch",
        error_curves(summary, "train", "training"),
        f"{summary.metric.error.capitalize()} on the training samples as given. "
        f"{wrong if noise else 'None were changed.'}",
    )


def error_curves(summary: Summary, split: str, title: str, seconds: Mapping[str, float] | None = None) -> Paint:
    """The error on a split by epoch, or by time where a step's seconds are given."""
    key, label = f"{split}_{summary.metric.name}", f"{title} {summary.metric.error}, %"
    return curves(summary.tested, key, label, error=True, seconds=seconds)


@register
def kappa_by_epoch(summary: Summary) -> Figure:
    """How flatness develops."""
    return Figure(
        "Kappa by epoch",
        curves(summary.tested, "kappa", "kappa"),
        "Relative flatness of the task's layer on the training data.",
    )


@register
def kappa_against_test(summary: Summary) -> Figure:
    """Whether flatter runs are better."""
    error, metric = summary.metric.error, summary.metric.name
    found = kappas(summary.tested, lambda result: error_of(result["test"][metric]))
    return Figure(
        f"Kappa against test {error}",
        points(found, ("kappa, training data", f"test {error}, %"), log=True),
        "Each point is one tested run.",
    )


@register
def kappa_against_gap(summary: Summary) -> Figure:
    """Whether flatter trials of the search generalise better, and their rank correlation."""
    arms, candidates = summary.comparison.plan.arms, summary.comparison.candidates
    searched = {
        arm.title: [trial for found in candidates if found.arm == arm.name for trial in found.trials] for arm in arms
    }
    found = kappas(searched, lambda result: result["validation"]["loss"] - result["train"]["loss"])
    return Figure(
        "Kappa against generalisation gap",
        points(found, ("kappa, training data", "validation loss − training loss"), log=True),
        f"Each point is one trial of the search.{rank_correlation(found)}",
    )


@register
def validation_by_setting(summary: Summary) -> Figure:
    """What the search saw."""
    error, groups = summary.metric.error, {}
    for arm in summary.comparison.plan.arms:
        tried = [found for found in summary.comparison.candidates if found.arm == arm.name]
        errors = [math.nan if found.diverged else error_of(found.score) for found in tried]
        groups[arm.title] = ([] if all(map(math.isnan, errors)) else range(1, len(errors) + 1), errors)

    def paint(axes: Axes) -> None:
        points(groups, ("place in the arm's grid", f"validation {error}, %"), joined=True)(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return Figure(
        f"Validation {error} by setting",
        paint,
        "Mean over the search seeds, from the first value of each arm's grid to the last.",
    )


@register
def calibration(summary: Summary) -> Figure | None:
    """Whether the networks are as sure as they are right; None where the task has no probabilities."""
    bins = {title: merged_bins(trials) for title, trials in summary.tested.items()}
    if not any(bins.values()):
        return None
    groups = {title: ([x for _, x, _ in own], [y for _, _, y in own]) for title, own in bins.items()}

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=LINES, linewidth=1)
        points(groups, ("confidence", "share that is right, test"), joined=True)(axes)

    return Figure(
        "Calibration on test data",
        paint,
        "Above the line: right more often than the network believes. All tested runs together.",
    )


def kappas(groups: Mapping[str, Sequence[Trial]], other: Callable[[Mapping[str, Any]], float]) -> dict[str, Pairs]:
    """Kappa and another number of each finished run's result, by title of the arm."""
    done = {title: [run.result for run in runs if run.finished] for title, runs in groups.items()}
    return {
        title: ([result["flatness"]["value"] for result in results], [other(result) for result in results])
        for title, results in done.items()
    }


def rank_correlation(groups: Mapping[str, Pairs]) -> str:
    """Kendall's tau of two numbers over all arms together; nothing where there is none.

    Ranks, as Jiang et al. (2020, https://arxiv.org/abs/1912.02178) compare measures with the gap: kappa spans orders
    of magnitude, and nothing says that the gap grows linearly with it.
    """
    one, other = ([value for pairs in groups.values() for value in pairs[k]] for k in (0, 1))
    tau = kendalltau(one, other).statistic if len(one) > 2 else math.nan
    if not math.isfinite(tau):  # all values of one are the same
        return ""
    return f" Rank correlation (Kendall's tau) {tau:+.2f} over {len(one)} trials."


def merged_bins(trials: Sequence[Trial]) -> list[Bin]:
    """Calibration bins of several runs' test splits as one: by tenths of confidence."""

    def tenth(one: Bin) -> int:
        return min(9, int(10 * one[1]))

    bins = [one for trial in trials if trial.finished for one in trial.result["test"].get("bins", ())]
    merged = []
    for _, group in groupby(sorted(bins, key=tenth), tenth):
        shares, confidences, rights = np.array(list(group)).T
        confidence, right = (np.average(values, weights=shares) for values in (confidences, rights))
        merged.append((shares.sum(), confidence, right))
    return merged
