"""``relflat.plot``: pictures of measurements; those of the lab's report are in ``relflat/lab/report/figures.py``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from relflat.errors import ConfigError
from relflat.plot.shown import ByLayer, Shown
from relflat.plot.style import COLOURS, INK, MARKERS, axes, log_if_wide, matplotlib, nothing_to_draw, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from relflat.result import Flatness
    from relflat.theory.loss_along import LossAlong

    Flats: TypeAlias = Flatness | Mapping[str, Flatness]

LABELS = {
    "value": "kappa, units of the loss",
    "trace": "Tr H, units of the loss / weight²",
    "layerwise": "||W||² Tr H, units of the loss",
    "weight_norm": "||W||",
    "feature_norm2": "mean of ||φ||²",
}
"""What numbers of a `Flatness` are called beside an axis."""
_ERRORS = {"value": "stderr", "trace": "trace_stderr"}
_FEW, _LEGIBLE = 6, 12  # lines that have a colour of their own, and that a legend names
_LABELLED = 24  # bars that get their number
_WIDE = 56  # letters across the axes


def layers(
    flats: "Flats | Mapping[str, Flats]", *, number: str = "value", log: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """A bar for each layer, with its standard error.

    Args:
        flats: what :func:`relflat.relative_flatness_by_layer` or :func:`relflat.relative_flatness` returned, or
            several of those by name (``{"before": ..., "after": ...}``), side by side.
        number: which number of :class:`relflat.Flatness`; its units are those beside the axis.
        log: a logarithmic axis, for layers that are decades apart.
        ax: where to draw.

    Raises:
        ConfigError: if there is no layer, or no such number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import relflat
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> flat = relflat.relative_flatness(model, nn.CrossEntropyLoss(), (x, y), layer="output")
        >>> relflat.plot.layers(flat).get_xlabel()
        'kappa, units of the loss'
    """
    groups, label = _groups(flats), _called(number)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise nothing_to_draw("no layer")
    thick, errors = 0.8 / len(groups), False
    with axes(ax, height=min(1.2 + (0.22 + 0.12 * len(groups)) * len(names), 14.0)) as drawn:
        for place, (title, group) in enumerate(groups.items()):
            at = [names.index(name) + thick * (place + 0.5) - 0.4 for name in group]
            values, whiskers = _numbers(group.values(), number)
            drawn.barh(at, values, thick * 0.9, color=_colour(place), alpha=0.85, label=title)
            errors |= _whiskers(drawn, at, values, whiskers)
            if len(names) * len(groups) <= _LABELLED:
                _label(drawn, at, values, whiskers)
        drawn.set_yticks(range(len(names)), names)
        drawn.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
        drawn.margins(x=0.12)
        drawn.grid(visible=False, axis="y")
        drawn.set(xlabel=label + (" (± standard error)" if errors else ""), ylabel="layer")
        drawn.set_xscale("log") if log else drawn.axvline(0, color=INK, linewidth=0.8)
        if len(groups) > 1:
            columns = max(1, min(len(groups), _WIDE // (max(map(len, groups)) + 6)))
            drawn.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0)
    return drawn


def history(measured: Any, *, number: str = "value", ax: "Axes | None" = None) -> "Axes":
    """One line for each layer over the steps at which it was measured, within a band of one standard error.

    Args:
        measured: a :class:`relflat.Monitor` or a callback that is one, or pairs ``(step, flats)``.
        number: which number of :class:`relflat.Flatness`.
        ax: where to draw.

    Raises:
        ConfigError: if nothing was measured yet, or there is no such number.
    """
    label = _called(number)
    records = [(step, ByLayer(flats)) for step, flats in getattr(measured, "history", measured)]
    names = list(dict.fromkeys(name for _, flats in records for name in flats))
    if not names:
        raise nothing_to_draw("nothing was measured yet")
    with axes(ax) as drawn:
        for place, name in enumerate(names):
            found = {step: flats[name] for step, flats in records if name in flats}
            look, (values, errors) = _look(place, len(names), alone=len(found) == 1), _numbers(found.values(), number)
            drawn.plot(list(found), values, label=name, **look)
            _band(drawn, list(found), values, errors, look["color"], 0.2 if len(names) <= _FEW else 0.08)
        drawn.set(xlabel=getattr(measured, "unit", "step"), ylabel=label)
        whole_numbers(drawn)
        log_if_wide(drawn, "y")
        _name_lines(drawn, names)
    return drawn


def samples(
    values: "Tensor | Sequence[float]",
    *,
    names: Sequence[object] | None = None,
    extremes: int = 4,
    ax: "Axes | None" = None,
) -> "Axes":
    """Kappa of each sample, sorted, with the sharpest and the flattest named and the mean, kappa of the whole.

    Args:
        values: one a sample, as of :func:`relflat.per_sample_flatness`.
        names: what samples are called; by default their place in the data.
        extremes: how many at each end are named.
        ax: where to draw.

    Raises:
        ConfigError: if there is no sample, or not a name for each.
    """
    kappa = torch.as_tensor(values, dtype=torch.float64).detach().cpu().flatten()
    names = range(len(kappa)) if names is None else names
    if len(kappa) == 0 or len(names) != len(kappa):
        raise nothing_to_draw(f"{len(kappa)} samples, {len(names)} names")
    order = torch.argsort(kappa, descending=True, stable=True).tolist()
    few, last = min(extremes, len(order) // 2), len(order) - 1
    sharpest, flattest = range(few), range(last - few + 1, last + 1)
    with axes(ax) as drawn:
        drawn.plot(range(1, last + 2), kappa[order], color=COLOURS[2], linewidth=1.6, zorder=2)
        for word, ranks, end, side in (("sharpest", sharpest, 0, 1), ("flattest", flattest, last, -1)) if few else ():
            which, colour = [order[rank] for rank in ranks], COLOURS[2 - side]
            drawn.plot([rank + 1 for rank in ranks], kappa[which], "o", color=colour, markersize=5, label=word)
            called = ", ".join(str(names[place]) for place in which)
            look: dict[str, Any] = {"ha": "left" if side > 0 else "right", "va": "center", "color": colour}
            at = end + 1, float(kappa[order[end]])
            drawn.annotate(f"{word}: {called}", at, (8 * side, 0), textcoords="offset points", **look)
        mean = float(kappa.mean())
        drawn.axhline(mean, color=INK, linestyle="--", linewidth=1)
        drawn.set(xlabel=f"samples in order of kappa, n={len(order)}", ylabel="kappa of the sample's own loss")
        log_if_wide(drawn, "y")
        where = drawn.get_yaxis_transform()  # across in shares of the axes, up in kappa
        drawn.annotate(f"mean {mean:.4g}", (0.99, mean), (0, 3), where, "offset points", ha="right", va="bottom")
    return drawn


def landscape(
    along: "LossAlong | Mapping[str, LossAlong]", *, rise: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """The loss along multiplicative directions of a layer, with the parabola that its kappa stands for.

    Args:
        along: what :func:`relflat.loss_along` returned, or several of those by name
            (``{"before": ..., "after": ...}``): thin lines are single directions, thick ones their mean.
        rise: draw what the loss rises by, so that networks of different loss can be compared.
        ax: where to draw.
    """
    several = dict(along) if isinstance(along, Mapping) else {"mean": along}
    if not several:
        raise nothing_to_draw("no loss along directions")
    with axes(ax) as drawn:
        low, high = math.inf, -math.inf
        for place, (title, one) in enumerate(several.items()):
            start = one.flat.loss if rise else 0.0
            losses, colour = one.losses - start, _colour(place)
            drawn.plot(one.radii, losses.T, color=colour, alpha=0.3, linewidth=0.8)
            drawn.plot(one.radii, losses.mean(0), color=colour, linewidth=2, label=f"{title}, kappa {one.flat:.3g}")
            drawn.plot(one.radii, one.parabola() - start, color=colour, linestyle="--", linewidth=1.2)
            low, high = min(low, float(losses.min())), max(high, float(losses.max()))
        room = 0.05 * (high - low or 1.0)
        drawn.set_ylim(low - room, high + room)  # a parabola may leave the picture
        drawn.plot([], [], color=INK, linestyle="--", linewidth=1.2, label="loss + δ² kappa / 2m")
        what = "rise of the loss" if rise else "loss"
        drawn.set(xlabel="δ, change of the layer's features relative to their size", ylabel=what)
        drawn.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return drawn


# -- how ---------------------------------------------------------------------------------------------------


def _groups(flats: Any) -> dict[str, ByLayer]:
    """Flatnesses by layer, by the name of their group."""
    if isinstance(flats, Shown):
        return {"": flats.alone()}
    if all(isinstance(flat, Shown) for flat in flats.values()):
        return {"": ByLayer(flats)}
    return {title: group.alone() if isinstance(group, Shown) else ByLayer(group) for title, group in flats.items()}


def _numbers(flats: "Iterable[Flatness]", number: str) -> tuple[list[float], list[float]]:
    """One of the numbers of each, and its standard error; 0 where it has none."""
    pairs = [(getattr(f, number), getattr(f, _ERRORS.get(number, ""), 0.0)) for f in flats]
    return [v for v, _ in pairs], [e for _, e in pairs]


def _called(number: str) -> str:
    """What a number is called beside an axis."""
    if number not in LABELS:
        raise ConfigError(f"number={number!r}: choose one of {list(LABELS)}")
    return LABELS[number]


def _whiskers(drawn: "Axes", at: list[float], values: list[float], errors: list[float]) -> bool:
    """One at each bar that has an error; whether there was any."""
    bars = [bar for bar in zip(at, values, errors, strict=True) if bar[2] > 0]
    for a, v, e in bars:
        drawn.errorbar(v, a, xerr=e, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    return bool(bars)


def _label(drawn: "Axes", at: list[float], values: list[float], errors: list[float]) -> None:
    """Write each bar's number beside it, beyond its whisker."""
    for a, v, e in zip(at, values, errors, strict=True):
        end = max(v + (e if e > 0 else 0.0), 0.0)
        drawn.annotate(f"{v:.3g}", (end, a), (4, 0), textcoords="offset points", va="center", size=8)


def _band(drawn: "Axes", at: list[int], values: list[float], errors: list[float], colour: Any, alpha: float) -> None:
    """One standard error around a line, where there is any."""
    if any(e > 0 for e in errors):
        low, high = ([v + s * e for v, e in zip(values, errors, strict=True)] for s in (-1, 1))
        drawn.fill_between(at, low, high, color=colour, alpha=alpha, linewidth=0)


def _colour(place: int) -> str:
    """That of a group or of one of a few lines."""
    return COLOURS[(2, 1, 3, 4, 5, 0)[place % 6]]


def _look(place: int, of: int, *, alone: bool) -> dict[str, Any]:
    """Colour and style of a line: its own among few, by depth among many; a marker where it has one point."""
    marker = {"marker": MARKERS[place % 6] if alone else "", "linewidth": 1.6}
    if of <= _FEW:
        return {"color": _colour(place), **marker}
    return {"color": matplotlib().colormaps["cividis"](0.9 * place / (of - 1)), **marker}


def _name_lines(drawn: "Axes", names: list[str]) -> None:
    """Name the lines beside the axes; of very many the first and the last, by a scale of colours."""
    if len(names) <= _LEGIBLE:
        drawn.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = len(names) - 1
    scale = ScalarMappable(Normalize(0, last / 0.9), "cividis")
    bar = drawn.figure.colorbar(scale, ax=drawn, ticks=[0, last], boundaries=[last * i / 200 for i in range(201)])
    bar.ax.set_yticklabels([names[0], names[-1]])
    bar.set_label(f"layer, the {len(names)} by depth")
