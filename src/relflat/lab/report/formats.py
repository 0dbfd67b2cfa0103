"""Numbers and settings as a reader sees them."""

import math

from relflat.lab.compare.arms import Values
from relflat.lab.compare.statistics import Difference

MeanSd = tuple[float, float]
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


def interval(pair: Difference, scale: int = 100, form: str = ".1f") -> str:
    """Both ends of a difference's interval, in percentage points."""
    return f"{scale * pair.low:+{form}} to {scale * pair.high:+{form}}"


def points(pair: Difference | None, scale: int = 100, form: str = ".1f") -> str:
    """A mean paired difference with its interval, in percentage points, or at another scale."""
    if pair is None:
        return ""
    return f"{scale * pair.mean:+{form}} ({'n = 1' if pair.n == 1 else interval(pair, scale, form)})"


def certainty(pair: Difference) -> str:
    """Interval, p and n of a difference, or why there are none."""
    if pair.n == 1:
        return "n = 1: no spread"
    return f"interval {interval(pair)}, p = {pair.p:.2g}, {pair.n} seeds"


def settings_text(settings: Values) -> str:
    """Settings as people write them on the command line, without the dashes."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )


def named(title: str, name: str) -> str:
    """An arm's title, followed by its name on the command line where one does not tell the other."""
    return title if title.lower().replace(" ", "-") == name else f"{title} ({name})"


def recipe_text(values: Values) -> str:
    """The recipe among a run's values, or nothing where there is none."""
    named = {"augmentation": "recipe_augment", "label smoothing": "recipe_smoothing", "dropout": "recipe_dropout"}
    found = [f"{word} {values[key]}" for word, key in named.items() if key in values]
    return ", ".join(found).replace("augmentation task", "augmentation as the task has it")
