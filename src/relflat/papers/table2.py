"""Table 2 of the FAM paper: skulls completed by an autoencoder whose second linear layer is kept flat.

The paper's six scores agree to four digits on two evaluation sets with different inputs, from strength .02 on. That
happens when the output no longer depends on the input, so every row here also says how much outputs differ
(``spread``).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from relflat.lab.compare.trials import Trial
from relflat.lab.train.config import RunConfig
from relflat.papers.experiment import Context, Outcome, Scale
from relflat.papers.painting import COLOURS, MARKERS, legend, line
from relflat.papers.sheets import Sheet
from relflat.papers.training_study import Size, numbers, train_all

SHEET = Sheet("table2")
SIZES = SHEET.sizes(Size)
TITLES: Mapping[str, str] = SHEET["gradients"]
PAPER: Mapping[float | None, tuple[float, float]] = {None: SHEET["plain"], **dict(SHEET["printed"])}
STRENGTHS = tuple(strength for strength, _ in SHEET["printed"])
SCORES = ("dice", "implant_dice", "hd", "hd95", "spread")


class Arm(NamedTuple):
    """One row: a strength and which part of the gradient is used; both None for plain training."""

    strength: float | None
    gradient: str | None

    @property
    def title(self) -> str:
        """In tables."""
        return "plain" if self.gradient is None else f"FAM {self.strength:g}, {TITLES[self.gradient]}"


PLAIN = Arm(None, None)
ARMS = (PLAIN, *(Arm(strength, gradient) for gradient, strength in product(TITLES, STRENGTHS)))


def configuration(arm: Arm, seed: int, size: Size) -> RunConfig:
    """The run of an arm and seed."""
    if arm == PLAIN:
        return size.config(seed, algorithm="plain")
    return size.config(seed, algorithm="fam", bound=None, layer=SHEET["layer"], **arm._asdict())


def run(context: Context) -> Outcome:
    """Train every arm and compare the completions on both evaluation sets."""
    size = SIZES[context.scale]
    places = [(arm, configuration(arm, seed, size)) for seed in size.seeds for arm in ARMS]
    return conclude(train_all(context, places), context.scale)


class Row(NamedTuple):
    """Means over the seeds of one arm."""

    first: Mapping[str, float]  # scores on the first evaluation set
    second: Mapping[str, float]  # and on the second
    kappa: float  # of the layer on the training data
    weight_norm: float  # of the layer

    @property
    def collapsed(self) -> bool:
        """Whether outputs hardly depend on the input."""
        return bool(max(self.first["spread"], self.second["spread"]) < SHEET["collapsed"])


Rows = Mapping[Arm, Row | None]


def row(trials: Sequence[Trial]) -> Row | None:
    """What an arm came to; None where a training diverged."""
    if not all(trial.finished for trial in trials):
        return None
    shifts = [trial.result["shifts"]["larger-defects"] for trial in trials]
    return Row(
        {score: fmean(numbers(trials, "test", score)) for score in SCORES},
        {score: fmean(shift[score] for shift in shifts) for score in SCORES},
        *(fmean(numbers(trials, "flatness", key)) for key in ("value", "weight_norm")),
    )


def conclude(by_arm: Mapping[Arm, Sequence[Trial]], scale: Scale) -> Outcome:
    """What the trainings show."""
    rows = {arm: row(trials) for arm, trials in by_arm.items()}
    size = SIZES[scale]
    words = {"seeds": ", ".join(map(str, size.seeds)), "collapsed": SHEET["collapsed"]}
    titles = {"spread": "spread", "implant_dice": "implant Dice"}
    return Outcome(
        findings=findings(rows),
        tables=[SHEET.table("scores", [cells(arm, found) for arm, found in rows.items()], **words)],
        figures=[
            SHEET.figure(score, partial(by_strength, rows, score, f"{title}, first evaluation set"))
            for score, title in titles.items()
        ],
        scaled=SHEET.differs(scale, **{**size.common, "seeds": len(size.seeds)}),
        data={
            "arms": [everything(arm, found, by_arm[arm]) for arm, found in rows.items()],
            "paper_dice": [{"strength": strength, "dice": list(dice)} for strength, dice in PAPER.items()],
        },
    )


def everything(arm: Arm, found: Row | None, trials: Sequence[Trial]) -> dict[str, Any]:
    """All numbers of one arm."""
    runs = [{**trial.tested, "shifts": trial.result.get("shifts")} for trial in trials]
    return {**arm._asdict(), "mean": found and found._asdict(), "collapsed": found and found.collapsed, "runs": runs}


def findings(rows: Rows) -> list[str]:
    """In words."""
    plain = rows[PLAIN]
    found = [collapse(gradient, rows) for gradient in TITLES]
    if plain is not None:
        found = [SHEET.say("plain", **plain._asdict()), *found, gain(plain, rows)]
    lost = [arm.title for arm, row in rows.items() if row is None]
    return [*found, SHEET.say("lost", arms="; ".join(lost))] if lost else found


def collapse(gradient: str, rows: Rows) -> str:
    """From which strength on the output is constant."""
    own = {arm.strength: row for arm, row in rows.items() if arm.gradient == gradient and row is not None}
    fallen = ", ".join(f"{strength:g}" for strength, row in own.items() if row.collapsed)
    spreads = ", ".join(f"{strength:g}: {row.first['spread']:.3f}" for strength, row in own.items())
    key = "collapse" if fallen else "diverse"
    return SHEET.say(key, gradient=TITLES[gradient], fallen=fallen, spreads=spreads)


def gain(plain: Row, rows: Rows) -> str:
    """Whether any arm that still looks at its input does better than plain training."""
    others = {arm.title: row for arm, row in rows.items() if arm != PLAIN and row is not None and not row.collapsed}
    if not others:
        return SHEET.say("none")
    best, row = max(others.items(), key=lambda pair: pair[1].first["dice"])
    printed = PAPER[STRENGTHS[-1]][0] - PAPER[None][0]
    return SHEET.say("best", arm=best, gain=row.first["dice"] - plain.first["dice"], printed=printed)


def cells(arm: Arm, found: Row | None) -> tuple[str, ...]:
    """All scores of one arm."""
    paper = " / ".join(f"{dice:.4f}" for dice in PAPER[arm.strength])
    if found is None:
        return (arm.title, paper, *["diverged"] * (len(SCORES) + 3))
    both = [f"{found.first[score]:.3f} / {found.second[score]:.3f}" for score in SCORES]
    state = "yes" if found.collapsed else "no"
    return (arm.title, paper, *both, f"{found.kappa:.3g}", f"{found.weight_norm:.3g}", state)


def by_strength(rows: Rows, score: str, label: str, axes: Axes) -> None:
    """Paint a score by strength, a line for each gradient; plain training at the left end."""
    for place, (gradient, title) in enumerate(TITLES.items()):
        own = [PLAIN, *(arm for arm in rows if arm.gradient == gradient)]
        points = [
            (0 if arm == PLAIN else 1 + STRENGTHS.index(arm.strength), found.first[score])
            for arm in own
            if (found := rows[arm]) is not None
        ]
        line(axes, points, marker=MARKERS[place], color=COLOURS[1 + place], label=title)
    axes.set_xticks(range(len(STRENGTHS) + 1), ["plain", *(f"{value:g}" for value in STRENGTHS)])
    axes.set(xlabel="strength", ylabel=label)
    axes.set_ylim(bottom=0)
    legend(axes)
