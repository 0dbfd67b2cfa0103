"""The report of a comparison: verdict, table and figures in one HTML file that needs no network."""

import html
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import kendalltau

from relflat.lab.compare import Candidate, Comparison
from relflat.lab.figures import (
    TITLES,
    curves,
    draw,
    kappa_against_error,
)
from relflat.lab.page import page, table
from relflat.lab.summary import (
    HEADINGS,
    Row,
    accuracy_differences,
    cells,
    remarks,
    rows,
    settings_text,
    verdict,
)
from relflat.lab.timing import StepCost
from relflat.lab.trials import Trial


def render(
    comparison: Comparison, costs: Mapping[str, StepCost], environment: Mapping[str, Any], notes: str
) -> str:
    """Write the whole page.

    Args:
        comparison: what came out.
        costs: seconds a step of each method.
        environment: where it ran.
        notes: what was run, in a sentence or two.
    """
    lines = rows(comparison, costs)
    pairs = accuracy_differences(comparison)
    title = f"Does flatness-aware training help on {comparison.plan.task}?"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(notes)}</p>',
        '<section class="verdict"><h2>Verdict</h2><ul>',
        *(f"<li>{html.escape(text)}</li>" for text in [*verdict(pairs), *remarks(comparison, lines)]),
        "</ul></section>",
        "<h2>Results</h2>",
        table(HEADINGS, [cells(line) for line in lines]),
        f'<p class="small">{html.escape(reading(lines))}</p>',
        "<h2>Pictures</h2>",
        pictures(comparison),
        "<h2>What was tried</h2>",
        tried(comparison),
        "<h2>Where</h2>",
        f'<p class="small">{html.escape(where(environment))}</p>',
    ]
    return page(title, "\n".join(body))


def reading(lines: Sequence[Row]) -> str:
    """How to read the table."""
    plain = lines[0]
    return (
        "Mean ± standard deviation over n seeds. kappa is the relative flatness of the output layer on the "
        "training data (smaller is flatter); it also falls when a network only grows more confident, so read "
        f"it beside confidence and ||W||. A step of {TITLES[plain.method]} training takes "
        f"{1000 * plain.cost.seconds:.2f} ms; “step” is the median ratio to it, all taking turns in "
        "one single-thread process; on a network this small that is mostly call overhead, and "
        "benchmarks/step_cost.py has the cost on ResNet-18. "
        "Intervals describe the spread over seeds, not over other test pictures; together they hold with 95 %."
    )


def pictures(comparison: Comparison) -> str:
    """The figures with their captions."""
    finals = comparison.finals
    searched = {
        method: [
            trial
            for candidate in comparison.candidates
            if candidate.method == method
            for trial in candidate.trials
        ]
        for method in finals
    }
    figures = [
        (
            draw(
                curves(finals, "validation_accuracy", "validation error, %", error=True),
                "Validation error by epoch",
            ),
            "Error on the clean validation labels. Line: mean over the tested seeds; band: their range.",
        ),
        (
            draw(
                curves(finals, "train_accuracy", "training error, %", error=True), "Training error by epoch"
            ),
            "Error on the training labels as given. " + noise_remark(finals),
        ),
        (
            draw(curves(finals, "kappa", "kappa of the output layer"), "Kappa by epoch"),
            "Relative flatness of the output layer on the training data.",
        ),
        (
            draw(kappa_against_error(finals, "test"), "Kappa against test error"),
            "Each point is one tested run.",
        ),
        (
            draw(kappa_against_error(searched, "validation"), "Kappa against validation error"),
            "Each point is one trial of the search. " + rank_correlation(comparison.candidates),
        ),
    ]
    return (
        '<div class="figures">'
        + "".join(
            f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for svg, caption in figures
        )
        + "</div>"
    )


def noise_remark(finals: Mapping[str, Sequence[Trial]]) -> str:
    """How many training labels are wrong."""
    changed = fmean(trial.result["label_noise_changed"] for trials in finals.values() for trial in trials)
    if not changed:
        return "All of them are right."
    return f"{100 * changed:.0f} % of them are wrong; an error well below that means they were memorised."


def rank_correlation(candidates: Sequence[Candidate]) -> str:
    """Kendall's tau of kappa and validation error over all trials of the search."""
    done = [trial.result for candidate in candidates for trial in candidate.trials if trial.finished]
    if len(done) < 3:
        return ""
    tau = kendalltau([r["flatness"]["value"] for r in done], [-r["validation"]["accuracy"] for r in done])
    return f"Rank correlation (Kendall's tau) {tau.statistic:+.2f} over {len(done)} trials."


def tried(comparison: Comparison) -> str:
    """All settings of the search and how they did on validation data."""
    plan = comparison.plan
    body = [
        (
            TITLES[candidate.method],
            f"{100 * candidate.accuracy:.2f}" if not candidate.diverged else f"{candidate.diverged} diverged",
            f"{candidate.loss:.3f}",
            settings_text(candidate.settings)
            + (" ← chosen" if candidate is comparison.chosen[candidate.method] else ""),
        )
        for candidate in comparison.candidates
    ]
    seeds = ", ".join(map(str, plan.search_seeds))
    text = (
        f"{len(next(iter(plan.grids.values())))} settings a method, each on seeds {seeds}: means on validation data; "
        "the test split was not evaluated in these trials. The chosen settings ran on seeds "
        f"{', '.join(map(str, plan.seeds))} and were tested once."
    )
    headings = ("method", "accuracy, %", "loss", "settings")
    return f'<p class="small">{html.escape(text)}</p>' + table(headings, body)


def where(environment: Mapping[str, Any]) -> str:
    """One line about the machine and the versions."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return (
        f"{environment['time']}, {environment['processor']}, {environment['cores']} cores, "
        f"{environment['device']}, Python {environment['python']}, {packages}."
    )
