"""The look of figures: colours that the colour-blind can tell apart, and axes that are logarithmic where need be."""

import math
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from relflat.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHEET: dict[str, Any] = tomllib.loads(Path(__file__).with_name("style.toml").read_text("utf-8"))
PALETTE: Mapping[str, tuple[str, str]] = SHEET["palette"]
STYLE = SHEET["matplotlib"] | {key: PALETTE[name][0] for key, name in SHEET["colours"].items()}
COLOURS = [PALETTE[f"c{place}"][0] for place in range(6)]
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = PALETTE["ink"][0]


def matplotlib() -> Any:
    """The package, imported when something is drawn.

    Raises:
        ImportError: naming the extra that has it.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ImportError('pictures need matplotlib: pip install "relflat[plot]"', name="matplotlib") from error
    return matplotlib


@contextmanager
def axes(ax: "Axes | None", width: float = 5.2, height: float = 3.4) -> Iterator["Axes"]:
    """The axes to draw in, with the look of these figures: those given, or of a new figure of so many inches."""
    look = matplotlib().rc_context(STYLE | {"axes.titlesize": STYLE["font.size"]})
    if ax is not None:
        with look:
            yield ax
        return
    import matplotlib.pyplot as plt

    # before the look is put on: the first figure loads the backend, and what a notebook's sets then has to stay
    figure = plt.figure(figsize=(width, height), layout="constrained", facecolor=STYLE["figure.facecolor"])
    with look:
        yield figure.add_subplot()


def log_if_wide(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic where its positive data span more than a factor of eight; say so."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = getattr(axes.dataLim, f"interval{which}")
    if not (0 < low < high < math.inf and high / low > 8):
        return
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low < 1000 else LogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: short(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(f"{axis.get_label_text()} (log)")


def whole_numbers(axes: "Axes") -> None:
    """Steps and epochs beside the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def short(value: float) -> str:
    """A number beside an axis: thousands as k from 10,000 on, powers of ten from a million on."""
    return f"{value / 1000:g}k" if 1e4 <= value < 1e6 else f"{value:g}"


def nothing_to_draw(what: str) -> ConfigError:
    """What to say where there is nothing to draw."""
    return ConfigError(f"there is nothing to draw: {what}")
