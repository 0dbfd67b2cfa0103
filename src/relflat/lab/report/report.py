"""The report of a comparison: verdict, table and figures in one HTML file that needs no network."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import kendalltau

from relflat.lab.compare.search import Candidate, Comparison
from relflat.lab.report.figures import captioned, curves, error_of, reliability, scatter, sweep
from relflat.lab.report.page import page, table
from relflat.lab.report.summary import (
    Row,
    cells,
    columns,
    finite,
    headings,
    merged_bins,
    metric_of,
    named,
    noise_share,
    remarks,
    rows,
    score_differences,
    settings_text,
    sweeps,
    verdict,
)
from relflat.lab.tasks.catalogue import title_of
from relflat.lab.train.timing import StepCost


def render(
    comparison: Comparison, costs: Mapping[str, StepCost], environment: Mapping[str, Any], notes: str
) -> str:
    """Write the whole page.

    Args:
        comparison: what came out.
        costs: seconds a step, by name of the arm.
        environment: where it ran.
        notes: what was run, in a sentence or two.
    """
    lines, shown = rows(comparison, costs), columns(comparison)
    body = [
        f"<h1>{html.escape(title(comparison))}</h1>",
        f'<p class="lead">{html.escape(notes)}</p>',
        '<section class="verdict"><h2>Verdict</h2><ul>',
        *(f"<li>{html.escape(text)}</li>" for text in findings(comparison, lines)),
        "</ul></section>",
        "<h2>Results</h2>",
        table(headings(shown), [cells(line, shown) for line in lines]),
        f'<p class="small">{html.escape(reading(comparison, lines))}</p>',
        "<h2>Pictures</h2>",
        pictures(comparison, costs),
        "<h2>What was tried</h2>",
        f'<p class="small">{html.escape(protocol(comparison))}</p>',
        table(tried_headings(comparison), tried(comparison)),
        "<h2>Where</h2>",
        f'<p class="small">{html.escape(where(environment))}</p>',
    ]
    return page(title(comparison), "\n".join(body))


def title(comparison: Comparison) -> str:
    """The question that the report answers."""
    return f"Does flatness-aware training help on {title_of(comparison.plan.task)}?"


def findings(comparison: Comparison, lines: Sequence[Row]) -> list[str]:
    """The verdict, then what else one should know."""
    costs = {line.title: line.cost for line in lines}
    shown = verdict(score_differences(comparison), metric_of(comparison), costs)
    return [*shown, *remarks(comparison, lines)]


def reading(comparison: Comparison, lines: Sequence[Row]) -> str:
    """How to read the table."""
    first, what = lines[0], metric_of(comparison).title
    alone = "; n = 1 has no spread" if any(line.n == 1 for line in lines) else ""
    return (
        f"Mean ± standard deviation over n seeds{alone}. kappa is the relative flatness of the task's layer on the "
        "training data (smaller is flatter); it also falls when a network only grows more confident, so read "
        f"it beside confidence and ||W||. A step of {first.title} takes {1000 * first.cost.seconds:.2f} ms; "
        "“step” is the median ratio to it, all arms taking turns in one single-thread process. On a network of "
        "a few small layers that is mostly call overhead; benchmarks/step_cost.py has the cost on ResNet-18. "
        f"“Validation at equal time” is the {what} on validation data when the first arm's training is over; an arm "
        "whose steps cost more is then in mid-schedule, at a learning rate that has not come down, so this is a "
        "lower bound. p-values: paired sign-flip permutation test, Holm-corrected. Intervals: BCa bootstrap over "
        "seeds, 95 % for all pairs together; with under about ten seeds they come out too narrow, so the verdict "
        "goes by p. They describe the spread over seeds, not over other test samples."
    )


def pictures(comparison: Comparison, costs: Mapping[str, StepCost]) -> str:
    """The figures with their captions."""
    arms = comparison.plan.arms
    finals = {arm.title: comparison.finals[arm.name] for arm in arms}
    seconds = {arm.title: costs[arm.name].seconds for arm in arms}
    searched = {
        arm.title: [
            trial
            for candidate in comparison.candidates
            if candidate.arm == arm.name
            for trial in candidate.trials
        ]
        for arm in arms
    }
    bins = {name: merged_bins(trials) for name, trials in finals.items()}
    metric = metric_of(comparison)
    error = metric.error
    validation, training = f"validation_{metric.name}", f"train_{metric.name}"
    figures = [
        (
            f"Validation {error} by epoch",
            curves(finals, validation, f"validation {error}, %", error=True),
            f"{error.capitalize()} on up to 1,000 validation samples, targets as published. Line: mean over the "
            "tested seeds; band: their range.",
        ),
        (
            f"Validation {error} by training time",
            curves(finals, validation, f"validation {error}, %", error=True, seconds=seconds),
            "The same against steps times the median seconds of a step.",
        ),
        (
            f"Training {error} by epoch",
            curves(finals, training, f"training {error}, %", error=True),
            f"{error.capitalize()} on the training samples as given. {noise_remark(comparison)}",
        ),
        (
            "Kappa by epoch",
            curves(finals, "kappa", "kappa"),
            "Relative flatness of the task's layer on the training data.",
        ),
        (
            f"Kappa against test {error}",
            scatter(finals, lambda result: error_of(result["test"][metric.name]), f"test {error}, %"),
            "Each point is one tested run.",
        ),
        (
            "Kappa against generalisation gap",
            scatter(searched, gap, "validation loss − training loss"),
            "Each point is one trial of the search. " + rank_correlation(comparison.candidates),
        ),
        (
            f"Validation {error} by setting",
            sweep(sweeps(comparison), f"validation {error}, %"),
            "Mean over the search seeds, from the first value of each arm's grid to the last.",
        ),
    ]
    if any(bins.values()):
        figures.append(
            (
                "Calibration on test data",
                reliability(bins),
                "Above the line: right more often than the network believes. All tested runs together.",
            )
        )
    return (
        '<div class="figures">'
        + "".join(captioned(paint, name, caption) for name, paint, caption in figures)
        + "</div>"
    )


def noise_remark(comparison: Comparison) -> str:
    """How many training labels are wrong."""
    changed = noise_share(comparison)
    if not changed:
        return "None were changed."
    return f"{100 * changed:.0f} % of them are wrong; an error well below that means they were memorised."


def gap(result: Mapping[str, Any]) -> float:
    """How much higher the validation loss is than the training loss."""
    return float(result["validation"]["loss"] - result["train"]["loss"])


def rank_correlation(candidates: Sequence[Candidate]) -> str:
    """Kendall's tau of kappa and that gap over all trials of the search."""
    done = [trial.result for candidate in candidates for trial in candidate.trials if trial.finished]
    if len(done) < 3:
        return ""
    tau = kendalltau([result["flatness"]["value"] for result in done], [gap(result) for result in done])
    if not math.isfinite(tau.statistic):  # all kappas or all gaps are the same
        return ""
    return f"Rank correlation (Kendall's tau) {tau.statistic:+.2f} over {len(done)} trials."


def tried_headings(comparison: Comparison) -> tuple[str, str, str, str]:
    """The first line of the table of trials."""
    return ("arm", f"validation {metric_of(comparison).title}, %", "validation loss", "settings")


def tried(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """All settings of the search and how they did on validation data."""
    titles = {arm.name: named(arm.title, arm.name) for arm in comparison.plan.arms}
    return [
        (
            titles[candidate.arm],
            f"{100 * candidate.score:.2f}" if not candidate.diverged else f"{candidate.diverged} diverged",
            finite(candidate.loss, ".3f"),
            settings_text(candidate.settings)
            + (" ← chosen" if candidate is comparison.chosen[candidate.arm] else ""),
        )
        for candidate in comparison.candidates
    ]


def protocol(comparison: Comparison) -> str:
    """What was chosen, on what, and where the grids come from."""
    plan = comparison.plan
    origins = "; ".join(f"{arm.title}: {arm.origin}" for arm in plan.arms if arm.origin)
    return (
        f"{len(plan.arms[0].values)} settings an arm, each on search seeds {', '.join(map(str, plan.search_seeds))}. "
        f"The setting with the highest mean validation {metric_of(comparison).title} was chosen; the test split was "
        "not evaluated in these trials. The chosen settings then ran on fresh seeds "
        f"{', '.join(map(str, plan.seeds))} and were tested once. Where the grids come from: {origins}."
    )


def where(environment: Mapping[str, Any]) -> str:
    """One line about the machine and the versions."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return (
        f"{environment['time']}, {environment['processor']}, {environment['cores']} cores, "
        f"{environment['device']}, Python {environment['python']}, {packages}."
    )
