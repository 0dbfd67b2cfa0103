"""What kappa costs: figures 4 and 5 of the FAM paper, with the forms of this library beside the full Hessian.

The paper forms the whole Hessian of a layer of k x k weights, k = 16 ... 256, in three ways, and estimates its trace
for k to 1024. Here all forms of a layer take turns in one process on the same batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes

from relflat.lab.compare.trials import one_thread
from relflat.lab.data import fetch
from relflat.lab.train import store
from relflat.lab.train.config import RunConfig, make
from relflat.lab.train.session import this_process
from relflat.lab.train.timing import clock_of, in_turns, step_costs
from relflat.papers.experiment import Context, Outcome, Scale, Table
from relflat.papers.forms import FORMS, PROBES, SAMPLES, SHEET, deviations, gigabytes, peak, problem, truth
from relflat.papers.painting import COLOURS, DASHES, MARKERS, legend, line, log_if_wide

PLACES: Mapping[str, str] = SHEET["places"]
CELLS = ("{ms:.1f}", "{ratio:.2f}", "{low:.2f} to {high:.2f}", "{sam:.2f}")  # of the table of steps
KEYS = {"seconds": "seconds", "megabytes": "peak memory, MB"}
LEAST = {"seconds": 0.0, "megabytes": 1.0}  # that a figure shows
OTHERS = [name for name, form in FORMS.items() if not form.hessian]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """What is timed at one scale."""

    widths: tuple[int, ...]  # k of the layers of k x k weights
    hessian_gigabytes: float  # full Hessians are formed while they are estimated to take less
    reference_to: int  # greatest k at which values are held against `relflat.reference`, too
    rounds: int  # timed turns of each form
    task: str  # whose training step is timed
    data: str  # its data set
    hidden: str  # its hidden layer that FAM is tried on
    common: Mapping[str, Any]  # values of the timed runs
    step_rounds: int  # timed rounds of training steps
    block: int  # steps a round


SIZES = SHEET.sizes(Size)


def measure(where: str, width: int, size: Size, device: torch.device) -> dict[str, Any]:
    """Time, memory and value of every form at one place and width, and what the reference says."""
    subject = problem(where, width, device)
    works = {
        name: partial(form.of, subject)
        for name, form in FORMS.items()
        if where in form.places
        and width <= form.most
        and not (form.hessian and gigabytes(width) > size.hessian_gigabytes)
    }
    memory = {name: peak(work, device) for name, work in works.items()}
    times = in_turns(list(works.values()), size.rounds, warm_up=0, clock=clock_of(device))
    forms = {
        name: {"seconds": median(own), "megabytes": memory[name], **asdict(works[name]())}
        for name, own in zip(works, times, strict=True)
    }
    known = truth(subject) if width <= size.reference_to else {}
    return {"where": where, "width": width, "forms": forms, "reference": known}


def step_configs(size: Size) -> dict[str, RunConfig]:
    """The training steps that are timed; the first is plain training."""
    common = {"task": size.task, **size.common}
    return {
        name: make({**common, **own, **({"layer": size.hidden} if "hidden" in name else {})})
        for name, own in SHEET["steps"].items()
    }


def measure_steps(size: Size) -> dict[str, Any]:
    """Seconds of a training step of each, and their ratio to plain training, all in one process."""
    configs = step_configs(size)
    costs = step_costs(list(configs.values()), rounds=size.step_rounds, block=size.block)
    return {name: asdict(cost) for name, cost in zip(configs, costs, strict=True)}


def run(context: Context) -> Outcome:
    """Time all forms at all widths, then the training steps, whose data must be there; what was timed is kept."""
    size, device = SIZES[context.scale], this_process().device
    fetch.require(size.data)
    folder = context.runs / f"cost-{context.scale}"
    folder.mkdir(parents=True, exist_ok=True)
    places = list(product(PLACES, size.widths))
    works = {f"{where}-{width}": partial(measure, where, width, size, device) for where, width in places}
    tell = context.counter("layers", len(works))
    found = []
    with one_thread():
        for name, work in {**works, "steps": partial(measure_steps, size)}.items():
            path = folder / f"{name}.json"
            if not path.is_file():
                store.write_json(path, work())
            found.append(store.read_json(path))
            if name in works:
                tell(name)
    return conclude(context.scale, found[:-1], found[-1], device)


def conclude(scale: Scale, records: Sequence[Record], steps: Record, device: torch.device) -> Outcome:
    """What the times show."""
    places = {where: [record for record in records if record["where"] == where] for where in PLACES}
    words = {"samples": SAMPLES, "probes": PROBES}
    both = [(key, own, {"place": PLACES[where], **words}) for key, (where, own) in product(KEYS, places.items())]
    on = "one thread of a CPU" if device.type == "cpu" else device.type
    sam = steps["SAM"]["ratio"]
    costs = {name: {**cost, "ms": 1000 * cost["seconds"], "sam": cost["ratio"] / sam} for name, cost in steps.items()}
    rows = [(name, *(text.format(**cost) for text in CELLS)) for name, cost in costs.items()]
    return Outcome(
        findings=[agreement(records), *growth(places), step_finding(steps)],
        tables=[
            *(table(key, own, **said) for key, own, said in both),
            SHEET.table("steps", rows, task=SIZES[scale].task),
        ],
        figures=[
            *(SHEET.figure(key, partial(by_width, own, key), **said) for key, own, said in both),
            SHEET.figure("steps", partial(bars, steps)),
        ],
        scaled=SHEET.differs(scale, **{**asdict(SIZES[scale]), **words}, device=on),
        data={"layers": list(records), "steps": dict(steps), "device": str(device)},
    )


def agreement(records: Sequence[Record]) -> str:
    """Whether all forms give one number."""
    found = [
        (f"{FORMS[name].title}, {record['where']}, {record['width']}²", ratio)
        for record in records
        for name, ratio in deviations(record).items()
    ]
    lost = [title for title, ratio in found if ratio > 1]
    checked = sum(bool(record["reference"]) for record in records)
    allowed = {"rtol": SHEET["rtol"], "sigmas": SHEET["sigmas"]}
    rule = SHEET.say("rule", **allowed, checked=checked, layers=len(records))
    result = SHEET.say("some" if lost else "all", lost=len(lost), n=len(found))
    return SHEET.say("agreement", result=result, rule=rule, names=": " + "; ".join(lost) if lost else "")


def growth(places: Mapping[str, Sequence[Record]]) -> list[str]:
    """How much less the library's forms take than the cheapest full Hessian, at the largest layer that has one."""
    found = []
    for where, records in places.items():
        full = [record for record in records if "func" in record["forms"]]
        if not full:
            continue
        name = "closed" if where == "output" else "ggn"
        sizes = {"large": full[-1], "small": full[0], "top": records[-1]}
        ours = {f"ours_{size}": milliseconds(record, name) for size, record in sizes.items()}
        (best, how), (least, _) = (
            min((milliseconds(record, form), form) for form in record["forms"] if FORMS[form].hessian)
            for record in (full[-1], full[0])
        )
        words = {"place": where.capitalize(), "form": FORMS[name].title, "how": FORMS[how].title.split(", ")[1]}
        beside = {"ratio": best / ours["ours_large"], "terabytes": 4 * records[-1]["width"] ** 4 / 1e12}
        found.append(SHEET.say("growth", best=best, least=least, **sizes, **ours, **words, **beside))
    return found


def milliseconds(record: Record, name: str) -> float:
    """What a form takes."""
    return 1000 * float(record["forms"][name]["seconds"])


def step_finding(steps: Record) -> str:
    """The cost of a training step beside the paper's."""
    sam, closed = steps["SAM"]["ratio"], steps["FAM, output, closed form"]
    ratios = {"cost": closed["ratio"], "low": closed["low"], "high": closed["high"], "sam": sam}
    above = {key: 100 * (ratio - 1) for key, ratio in ratios.items()}
    printed = [100 * (ratio - 1) for ratio in SHEET["step"]]
    return SHEET.say("step", **above, printed=printed, relative=closed["ratio"] / sam)


def table(key: str, records: Sequence[Record], **words: Any) -> Table:
    """A number of every form by width."""
    names = [name for name in FORMS if any(name in record["forms"] for record in records)]
    rows = [(FORMS[name].title, *(cell(record, name, key) for record in records)) for name in names]
    return SHEET.table(key, rows, [f"{record['width']}²" for record in records], **words)


def cell(record: Record, name: str, key: str) -> str:
    """A number of one form at one width, or why there is none."""
    width, own = record["width"], record["forms"].get(name)
    if own is None:
        return f"needs {gigabytes(width):,.1f} GB" if width <= FORMS[name].most else ""
    if own[key] is None:
        return "not known"
    return f"{own[key]:.2g}" if own[key] < 100 else f"{own[key]:,.0f}"


def by_width(records: Sequence[Record], key: str, axes: Axes) -> None:
    """Paint a number of every form by width; full Hessians share a colour, estimates are dashed."""
    for place, (name, form) in enumerate(FORMS.items()):
        there = [(record["width"], record["forms"][name]) for record in records if name in record["forms"]]
        line(
            axes,
            [(width, own[key]) for width, own in there if (own[key] or 0.0) > LEAST[key]],
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linestyle=DASHES[int(any(own["stderr"] for _, own in there))],
            color=COLOURS[0 if form.hessian else 1 + OTHERS.index(name)],
            label=form.title.removesuffix(f", {PROBES}").removesuffix(f", {PROBES} products"),
        )
    axes.set_xlabel("k, layer of k x k weights")
    axes.set_ylabel(KEYS[key])
    if axes.lines:
        log_if_wide(axes, "x")
        log_if_wide(axes, "y")
        axes.set_xticks([record["width"] for record in records], [str(record["width"]) for record in records])
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=2, fontsize=8, handlelength=2.2)


def bars(steps: Record, axes: Axes) -> None:
    """Paint the ratios of the steps with their quartiles, and the paper's range."""
    names, costs = list(steps)[::-1], list(steps.values())[::-1]
    ratios = [cost["ratio"] for cost in costs]
    spread = [[cost["ratio"] - cost["low"] for cost in costs], [cost["high"] - cost["ratio"] for cost in costs]]
    axes.axvspan(*SHEET["step"], color=COLOURS[0], alpha=0.2, linewidth=0, label="the paper's FAM")
    axes.errorbar(ratios, range(len(names)), xerr=spread, fmt="o", color=COLOURS[1])
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n", 1) for name in names])
    axes.set_xlabel("time of a step, relative to plain")
    legend(axes)
