"""What a comparison says, as numbers and as plain sentences; printed on the terminal and in the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relflat.lab.compare import Comparison, Values
from relflat.lab.figures import TITLES
from relflat.lab.statistics import Difference, differences, mean_sd
from relflat.lab.timing import StepCost
from relflat.lab.trials import Trial


@dataclass(frozen=True)
class Row:
    """One method's line in the table; numbers are (mean, sd) over the tested runs.

    Attributes:
        method: its name.
        settings: what was chosen on validation data.
        n: number of tested runs that finished.
        diverged: number that did not.
        accuracy: on the test split.
        loss: on the test split.
        kappa: of the output layer on the training data.
        confidence: mean of the largest probability on the training data.
        weight_norm: of the output layer.
        cost: seconds a step.
    """

    method: str
    settings: Values
    n: int
    diverged: int
    accuracy: tuple[float, float]
    loss: tuple[float, float]
    kappa: tuple[float, float]
    confidence: tuple[float, float]
    weight_norm: tuple[float, float]
    cost: StepCost


def rows(comparison: Comparison, costs: Mapping[str, StepCost]) -> list[Row]:
    """Summarise the tested runs of each method."""
    return [
        row(method, comparison.chosen[method].settings, trials, costs[method])
        for method, trials in comparison.finals.items()
    ]


def row(method: str, settings: Values, trials: Sequence[Trial], cost: StepCost) -> Row:
    """Summarise the tested runs of one method."""
    done = [trial.result for trial in trials if trial.finished]

    def over_seeds(part: str, key: str) -> tuple[float, float]:
        return mean_sd([result[part][key] for result in done]) if done else (math.nan, math.nan)

    return Row(
        method=method,
        settings=settings,
        n=len(done),
        diverged=len(trials) - len(done),
        accuracy=over_seeds("test", "accuracy"),
        loss=over_seeds("test", "loss"),
        kappa=over_seeds("flatness", "value"),
        confidence=over_seeds("flatness", "confidence"),
        weight_norm=over_seeds("flatness", "weight_norm"),
        cost=cost,
    )


def accuracy_differences(comparison: Comparison) -> list[Difference]:
    """Paired differences of test accuracy, over the seeds on which every method finished."""
    whole = [
        place
        for place in range(len(comparison.plan.seeds))
        if all(trials[place].finished for trials in comparison.finals.values())
    ]
    if not whole:
        return []
    return differences(
        {
            method: [trials[place].result["test"]["accuracy"] for place in whole]
            for method, trials in comparison.finals.items()
        }
    )


def verdict(pairs: Sequence[Difference]) -> list[str]:
    """Say in plain English what the differences show, one sentence a pair."""
    if not pairs:
        return ["Nothing can be compared: on every seed some method diverged."]
    return [sentence(pair) for pair in pairs]


def sentence(pair: Difference) -> str:
    """What one difference shows."""
    first, second = TITLES[pair.first], TITLES[pair.second]
    points = f"{100 * pair.mean:+.1f} points of test accuracy"
    interval = f"interval {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
    detail = f"{points} ({interval}, p = {pair.p:.2g}, {pair.n} seeds)"
    if pair.shown:
        return f"{second} is {'better' if pair.mean > 0 else 'worse'} than {first}: {detail}."
    return f"{second} against {first}: no difference shown, {detail}."


def remarks(comparison: Comparison, lines: Sequence[Row]) -> list[str]:
    """What else a reader should know before believing the table."""
    found = []
    if len(comparison.plan.seeds) < 10:
        found.append("So few seeds show large differences only; --seeds 10 tells more.")
    done = [line for line in lines if line.n]
    if done:
        flattest = min(done, key=lambda line: line.kappa[0])
        best = max(done, key=lambda line: line.accuracy[0])
        agree = "is also" if flattest is best else "is not"
        found.append(
            f"The method with the lowest kappa, {TITLES[flattest.method]}, {agree} the one with the highest "
            "mean test accuracy."
        )
    return found + radius_remark(comparison)


def radius_remark(comparison: Comparison) -> list[str]:
    """Whether FAM's chosen setting penalises kappa itself, and how far the other kind was on validation data."""
    chosen = comparison.chosen.get("fam")
    if chosen is None or "radius" not in chosen.settings:
        return []
    own = [candidate for candidate in comparison.candidates if candidate.method == "fam"]
    exact = max(
        (candidate for candidate in own if "radius" not in candidate.settings),
        key=lambda candidate: candidate.accuracy,
        default=None,
    )
    text = "FAM's chosen setting is a finite radius: noise on the features, scaled by their norm, not kappa itself."
    if exact is not None:
        text += (
            f" The best setting with kappa itself reached {100 * exact.accuracy:.1f} % on validation data, "
            f"the chosen one {100 * chosen.accuracy:.1f} %."
        )
    return [text]


def settings_text(settings: Values) -> str:
    """Settings as people write them on the command line, without the dashes."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
    )


def percent(pair: tuple[float, float]) -> str:
    """Mean and deviation of a share, in percent."""
    return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"


def number(pair: tuple[float, float]) -> str:
    """Mean and deviation with three significant digits."""
    return f"{pair[0]:.3g} ± {pair[1]:.1g}"


def cost_text(cost: StepCost) -> str:
    """Cost of a step relative to the first method."""
    return f"{cost.ratio:.2f}x"


HEADINGS = (
    "method",
    "test accuracy, %",
    "test loss",
    "kappa",
    "confidence",
    "||W||",
    "step",
    "n",
    "chosen on validation",
)
SHORT_HEADINGS = ("method", "test accuracy, %", "kappa", "confidence", "||W||", "step")


def short_cells(line: Row) -> tuple[str, ...]:
    """A row for a terminal of 80 columns, in the order of ``SHORT_HEADINGS``."""
    return tuple(
        text for heading, text in zip(HEADINGS, cells(line), strict=True) if heading in SHORT_HEADINGS
    )


def cells(line: Row) -> tuple[str, ...]:
    """A row of the table as text, in the order of ``HEADINGS``."""
    return (
        TITLES[line.method],
        percent(line.accuracy),
        number(line.loss),
        number(line.kappa),
        number(line.confidence),
        number(line.weight_norm),
        cost_text(line.cost),
        str(line.n) + (f" (+{line.diverged} diverged)" if line.diverged else ""),
        settings_text(line.settings),
    )
