"""What kappa costs: figures 4 and 5 of the FAM paper, with the forms of this library beside the full Hessian.

The paper forms the whole Hessian of a layer of k x k weights, k = 16 ... 256, in three ways, and estimates its trace
for k to 1024. Here all forms of a layer take turns in one process on the same batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import functional_call
from torch.func import hessian as func_hessian

from relflat import relative_flatness
from relflat.lab.data import fetch
from relflat.lab.report.figures import COLOURS, DASHES, MARKERS, legend, log_if_wide
from relflat.lab.train import launch, store
from relflat.lab.train.config import RunConfig, make
from relflat.lab.train.timing import step_costs
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Scale, Table
from relflat.papers.peak import race
from relflat.theory import reference

Where = Literal["output", "hidden"]
PLACES: tuple[Where, ...] = ("output", "hidden")
PROBES = 16
SAMPLES = 32
FLOAT32_RTOL = 1e-4  # allowed error of the forms that are exact
SIGMAS = 5.0  # allowed error of the estimates, in standard errors
PAPER_STEP = (1.2, 1.4)  # "20-40 %" above plain and SAM training


@dataclass(frozen=True)
class Size:
    """What is timed at one scale.

    Attributes:
        widths: k of the layers of k x k weights.
        hessian_gigabytes: full Hessians are formed while they are estimated to take less.
        reference_to: greatest k at which values are held against `relflat.theory.reference`, too.
        rounds: timed turns of each form.
        task: whose training step is timed.
        data: its data set.
        hidden: its hidden layer that FAM is tried on.
        common: values of the timed runs.
        step_rounds: timed rounds of training steps.
        block: steps a round.
    """

    widths: tuple[int, ...]
    hessian_gigabytes: float
    reference_to: int
    rounds: int
    task: str
    data: str
    hidden: str
    common: Mapping[str, Any]
    step_rounds: int
    block: int


SIZES: dict[Scale, Size] = {
    "small": Size(
        (16, 32, 64, 128, 256, 512, 1024), 0.4, 32, 5, "cifar10", "cifar10", "fc", {"train_size": 640}, 21, 5
    ),
    "paper": Size(
        (16, 32, 64, 128, 256, 512, 1024),
        60.0,
        64,
        15,
        "cifar10-resnet18",
        "cifar10",
        "features",
        {"train_size": 6400},
        41,
        10,
    ),
}


# -- forms of kappa ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A layer of k x k weights and a batch. Time does not depend on what the numbers are, so they are random.

    Attributes:
        model: the layer alone, with k classes; or with ReLU and an output layer of ten classes after it.
        inputs: (n, k).
        targets: (n,).
        layer: its name.
    """

    model: nn.Sequential
    inputs: Float[Tensor, "n k"]
    targets: Tensor
    layer: str = "0"

    def loss(self, weight: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
        """The loss as a function of the layer's weight."""
        outputs = functional_call(self.model, {"0.weight": weight}, (self.inputs,))
        return nn.functional.cross_entropy(outputs, self.targets)

    @property
    def weight(self) -> Float[Tensor, "k k"]:
        """The layer's weight, outside of any graph."""
        return self.model.get_parameter("0.weight").detach()


def problem(where: Where, width: int, device: torch.device) -> Problem:
    """The problem of one place and width, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(width)
        layer = nn.Linear(width, width)
        tail = [] if where == "output" else [nn.ReLU(), nn.Linear(width, 10)]
        model = nn.Sequential(layer, *tail).to(device)
        inputs = torch.randn(SAMPLES, width).to(device)
        targets = torch.randint(width if where == "output" else 10, (SAMPLES,)).to(device)
    return Problem(model, inputs, targets)


@dataclass(frozen=True)
class Value:
    """What a form gives.

    Attributes:
        value: kappa, or the trace.
        stderr: standard error of an estimate; 0 where the form is exact.
    """

    value: float
    stderr: float = 0.0


def by_hessian(problem: Problem, how: Callable[..., Any]) -> Value:
    """Kappa out of the whole Hessian: k^4 numbers."""
    weight = problem.weight
    H = how(problem.loss, weight)
    return Value(float(torch.einsum("st,ut,srur->", weight, weight, H.detach())))


def all_at_once(loss: Callable[[Tensor], Tensor], weight: Float[Tensor, "k k"]) -> Float[Tensor, "k k k k"]:
    """The Hessian by `torch.func`."""
    found: Tensor = func_hessian(loss)(weight)
    return found


def hutchinson_trace(problem: Problem) -> Value:
    """``Tr H`` by products with random signs in the space of the weight, as the paper's layerwise measure needs."""
    weight = problem.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(weight), weight, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PROBES):
        signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
        (along,) = torch.autograd.grad((gradient * signs).sum(), weight, retain_graph=True)
        found.append((along * signs).sum())
    values = torch.stack(found).double()
    return Value(float(values.mean()), float(values.std()) / math.sqrt(PROBES))


def by_library(problem: Problem, **options: Any) -> Value:
    """Kappa by `relflat.relative_flatness`."""
    found = relative_flatness(
        problem.model,
        nn.CrossEntropyLoss(),
        (problem.inputs, problem.targets),
        layer=problem.layer,
        **options,
    )
    return Value(found.value, found.stderr)


@dataclass(frozen=True)
class Form:
    """One way to compute kappa, or the trace.

    Attributes:
        title: in tables.
        of: does it.
        places: layers that it is for.
        hessian: it forms the whole Hessian.
        most: greatest k it is timed at.
        trace: it estimates the trace, not kappa.
    """

    title: str
    of: Callable[[Problem], Value]
    places: tuple[Where, ...] = PLACES
    hessian: bool = False
    most: int = 1024
    trace: bool = False


FORMS = {
    "rows": Form(
        "full Hessian, row by row", partial(by_hessian, how=autograd_hessian), hessian=True, most=256
    ),
    "vectorised": Form(
        "full Hessian, vectorised",
        partial(by_hessian, how=partial(autograd_hessian, vectorize=True)),
        hessian=True,
        most=256,
    ),
    "func": Form("full Hessian, torch.func", partial(by_hessian, how=all_at_once), hessian=True, most=256),
    "trace": Form(f"Tr H only, Hutchinson, {PROBES} products", hutchinson_trace, trace=True),
    "closed": Form("closed form", partial(by_library, method="closed_form"), places=("output",)),
    "exact": Form("sum over a basis", partial(by_library, method="exact")),
    "probe": Form(
        f"Hessian probes, {PROBES}", partial(by_library, method="probe", probes=PROBES), places=("hidden",)
    ),
    "ggn": Form(
        f"Gauss-Newton probes, {PROBES}",
        partial(by_library, method="probe", probes=PROBES, curvature="ggn"),
        places=("hidden",),
    ),
}


def gigabytes(width: int) -> float:
    """Estimate of what a full Hessian takes: k^4 numbers, and some of k^2 x samples x 2 k on the way."""
    return 4 * (width**4 + 3 * width**2 * SAMPLES * 2 * width) / 1e9


def measure(where: Where, width: int, size: Size, device: torch.device) -> dict[str, Any]:
    """Time, memory and value of every form at one place and width, and what the reference says."""
    subject = problem(where, width, device)
    forms = {
        name: form
        for name, form in FORMS.items()
        if where in form.places
        and width <= form.most
        and not (form.hessian and gigabytes(width) > size.hessian_gigabytes)
    }
    uses = race({name: partial(form.of, subject) for name, form in forms.items()}, size.rounds, device)
    values = {name: form.of(subject) for name, form in forms.items()}
    truth: dict[str, float] = {}
    if width <= size.reference_to:
        loss, weight = reference.at_layer(
            subject.model, nn.CrossEntropyLoss(), subject.inputs, subject.targets, subject.layer
        )
        H = reference.layer_hessian(loss, weight.detach()).detach()
        truth = {
            "kappa": float(reference.kappa_of_hessian(weight.detach(), H)),
            "trace": float(H.reshape(weight.numel(), -1).trace()),
        }
    return {
        "where": where,
        "width": width,
        "forms": {name: {**asdict(uses[name]), **asdict(values[name])} for name in forms},
        "reference": truth,
    }


def deviations(record: Mapping[str, Any]) -> dict[str, float]:
    """Each form's distance from the truth, in units of what is allowed: at most 1 is agreement.

    The truth is the reference's; where that is too large, the first form that is exact.
    """
    forms = record["forms"]
    exact = [form["value"] for form in forms.values() if form["stderr"] == 0]
    found = {}
    for name, form in forms.items():
        truth = record["reference"].get("trace" if FORMS[name].trace else "kappa")
        if truth is None and not FORMS[name].trace and exact:
            truth = exact[0]
        if truth is not None:
            allowed = SIGMAS * form["stderr"] + FLOAT32_RTOL * abs(truth)
            found[name] = abs(form["value"] - truth) / allowed
    return found


# -- cost of a training step ---------------------------------------------------------------------------------------


def step_configs(size: Size) -> dict[str, RunConfig]:
    """The training steps that are timed; the first is plain training."""

    def config(algorithm: str, **settings: Any) -> RunConfig:
        return make({"task": size.task, **size.common, "algorithm": algorithm, **settings})

    return {
        "plain": config("plain"),
        "SAM": config("sam"),
        "FAM, output, closed form": config("fam"),
        "FAM, output, one probe": config("fam", method="probe"),
        "FAM, hidden layer, one probe": config("fam", layer=size.hidden, method="probe"),
        "FAM, hidden layer, finite radius": config("fam", layer=size.hidden, radius=0.35, strength=1.0),
    }


def measure_steps(size: Size) -> dict[str, Any]:
    """Seconds of a training step of each, and their ratio to plain training, all in one process."""
    configs = step_configs(size)
    costs = step_costs(list(configs.values()), rounds=size.step_rounds, block=size.block)
    return {name: asdict(cost) for name, cost in zip(configs, costs, strict=True)}


# -- the experiment --------------------------------------------------------------------------------------------


def run(context: Context) -> Outcome:
    """Time all forms at all widths, then the training steps; what was timed is kept.

    Raises:
        DataError: the data set of the training steps was not fetched.
    """
    size = SIZES[context.scale]
    fetch.require(size.data)
    folder = context.runs / f"cost-{context.scale}"
    folder.mkdir(parents=True, exist_ok=True)
    device = launch.this_process().device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = []
        for where, width in product(PLACES, size.widths):
            path = folder / f"{where}-{width}.json"
            if not path.is_file():
                store.write_json(path, measure(where, width, size, device))
                context.on_progress(f"{where} layer, {width} x {width}")
            records.append(store.read_json(path))
        path = folder / "steps.json"
        if not path.is_file():
            store.write_json(path, measure_steps(size))
        steps = store.read_json(path)
    finally:
        torch.set_num_threads(threads)
    return conclude(size, records, steps, device)


def conclude(
    size: Size, records: Sequence[Mapping[str, Any]], steps: Mapping[str, Any], device: torch.device
) -> Outcome:
    """What the times show."""
    places = {
        where: [record for record in records if record["where"] == where] for where in ("output", "hidden")
    }
    titles = {"output": "output layer", "hidden": "hidden layer"}
    return Outcome(
        findings=[agreement(records), *growth(places), *step_findings(steps)],
        tables=[
            *(table(f"Seconds, {titles[where]}", own, "seconds", size) for where, own in places.items()),
            *(
                table(f"Peak memory in MB, {titles[where]}", own, "megabytes", size)
                for where, own in places.items()
            ),
            step_table(size, steps),
        ],
        figures=[
            *(
                Figure(
                    f"Time, {titles[where]}",
                    partial(curves, own, "seconds", "seconds"),
                    f"Of one batch of {SAMPLES} samples, median over the rounds. Dashed: estimates.",
                )
                for where, own in places.items()
            ),
            *(
                Figure(
                    f"Memory, {titles[where]}",
                    partial(curves, own, "megabytes", "peak memory, MB"),
                    "Above what was in use before; less than 1 MB is not shown.",
                )
                for where, own in places.items()
            ),
            Figure(
                "Cost of a training step",
                partial(bars, steps),
                "Relative to plain training; lines: quartiles.",
            ),
        ],
        scaled=scaled(size, device),
        data={"layers": list(records), "steps": dict(steps), "device": str(device)},
    )


def agreement(records: Sequence[Mapping[str, Any]]) -> str:
    """Whether all forms give one number."""
    found = [
        (ratio, record["where"], record["width"], name)
        for record in records
        for name, ratio in deviations(record).items()
    ]
    checked = sum(bool(record["reference"]) for record in records)
    lost = [f"{FORMS[name].title}, {where}, {width}²" for ratio, where, width, name in found if ratio > 1]
    rule = (
        f"exact forms within {FLOAT32_RTOL:g} in single precision, estimates within {SIGMAS:g} standard errors; "
        f"{checked} of {len(records)} layers were small enough to hold against the definition in double precision, "
        "the others against each other"
    )
    if lost:
        return f"{len(lost)} of {len(found)} values do not agree ({rule}): {'; '.join(lost)}."
    return f"All {len(found)} values agree ({rule})."


def growth(places: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """How much less the library's forms take than the cheapest full Hessian, at the largest layer that has one."""
    found = []
    for where, records in places.items():
        full = [record for record in records if "func" in record["forms"]]
        if not full:
            continue
        forms = full[-1]["forms"]
        best = min((forms[name]["seconds"], name) for name in forms if FORMS[name].hessian)
        ours = "closed" if where == "output" else "ggn"
        ratio = best[0] / forms[ours]["seconds"]
        top, small = records[-1], full[0]["forms"]
        least = min(small[name]["seconds"] for name in small if FORMS[name].hessian)
        found.append(
            f"{where.capitalize()} layer of {full[-1]['width']}²: {FORMS[ours].title} takes "
            f"{1000 * forms[ours]['seconds']:.1f} ms, the fastest full Hessian "
            f"({FORMS[best[1]].title.split(', ')[1]}) {1000 * best[0]:.0f} ms, {ratio:,.0f} times as long; at "
            f"{top['width']}² it takes {1000 * top['forms'][ours]['seconds']:.1f} ms, where a full Hessian would "
            f"need {4 * top['width'] ** 4 / 1e12:,.1f} TB. At {full[0]['width']}² it is "
            f"{1000 * small[ours]['seconds']:.1f} ms against {1000 * least:.1f} ms: small layers gain little."
        )
    return found


def step_findings(steps: Mapping[str, Any]) -> list[str]:
    """The cost of a training step beside the paper's."""
    sam = steps["SAM"]["ratio"]
    closed = steps["FAM, output, closed form"]
    cost = 100 * (closed["ratio"] - 1)
    low, high = (100 * (value - 1) for value in PAPER_STEP)
    return [
        f"A training step with FAM on the output layer in closed form takes {cost:+.0f} % (quartiles "
        f"{100 * (closed['low'] - 1):+.0f} to {100 * (closed['high'] - 1):+.0f} %) against plain training; the paper "
        f"has {low:.0f} to {high:.0f} % above plain and SAM training. SAM takes {100 * (sam - 1):+.0f} % here, so "
        f"FAM takes {closed['ratio'] / sam:.2f} of a SAM step."
    ]


def table(title: str, records: Sequence[Mapping[str, Any]], key: str, size: Size) -> Table:
    """A number of every form by width."""
    rows = []
    for name, form in FORMS.items():
        if not any(name in record["forms"] for record in records):
            continue
        cells = []
        for record in records:
            own = record["forms"].get(name)
            if own is None:
                cells.append(
                    f"needs {gigabytes(record['width']):,.1f} GB" if record["width"] <= form.most else ""
                )
            elif own[key] is None:
                cells.append("not known")
            else:
                cells.append(f"{own[key]:.2g}" if own[key] < 100 else f"{own[key]:,.0f}")
        rows.append((form.title, *cells))
    return Table(
        title,
        ("form", *(f"{record['width']}²" for record in records)),
        tuple(rows),
        f"{SAMPLES} samples. Forms with {PROBES} probes are estimates; the others are exact.",
    )


def step_table(size: Size, steps: Mapping[str, Any]) -> Table:
    """Cost of a training step."""
    return Table(
        f"A training step of {size.task}",
        ("algorithm", "ms", "ratio to plain", "quartiles", "ratio to SAM"),
        tuple(
            (
                name,
                f"{1000 * cost['seconds']:.1f}",
                f"{cost['ratio']:.2f}",
                f"{cost['low']:.2f} to {cost['high']:.2f}",
                f"{cost['ratio'] / steps['SAM']['ratio']:.2f}",
            )
            for name, cost in steps.items()
        ),
        "Median over the rounds of the ratio within a round, all algorithms taking turns on the same batches in one "
        "process.",
    )


def curves(records: Sequence[Mapping[str, Any]], key: str, label: str, axes: Axes) -> None:
    """Paint a number of every form by width; full Hessians share a colour, estimates are dashed."""
    least = 1.0 if key == "megabytes" else 0.0
    others = [name for name, form in FORMS.items() if not form.hessian]
    for place, (name, form) in enumerate(FORMS.items()):
        points = [
            (record["width"], record["forms"][name][key])
            for record in records
            if name in record["forms"] and (record["forms"][name][key] or 0.0) > least
        ]
        if points:
            axes.plot(
                [width for width, _ in points],
                [value for _, value in points],
                marker=MARKERS[place % len(MARKERS)],
                markersize=5,
                linestyle=DASHES[int(any(record["forms"].get(name, {}).get("stderr") for record in records))],
                color=COLOURS[0 if form.hessian else 1 + others.index(name)],
                label=form.title.removesuffix(f", {PROBES}").removesuffix(f", {PROBES} products"),
            )
    axes.set_xlabel("k, layer of k x k weights")
    axes.set_ylabel(label)
    if not axes.lines:
        return
    log_if_wide(axes, "x")
    log_if_wide(axes, "y")
    axes.set_xticks([record["width"] for record in records], [str(record["width"]) for record in records])
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=2, fontsize=8, handlelength=2.2)


def bars(steps: Mapping[str, Any], axes: Axes) -> None:
    """Paint the ratios of the steps with their quartiles, and the paper's range."""
    names = list(steps)[::-1]
    ratios = [steps[name]["ratio"] for name in names]
    spread = [
        [steps[name]["ratio"] - steps[name]["low"] for name in names],
        [steps[name]["high"] - steps[name]["ratio"] for name in names],
    ]
    axes.axvspan(*PAPER_STEP, color=COLOURS[0], alpha=0.2, linewidth=0, label="the paper's FAM")
    axes.errorbar(ratios, range(len(names)), xerr=spread, fmt="o", color=COLOURS[1])
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n", 1) for name in names])
    axes.set_xlabel("time of a step, relative to plain")
    legend(axes)


def scaled(size: Size, device: torch.device) -> list[str]:
    """What differs from the paper."""
    return [
        f"On {'one thread of a CPU' if device.type == 'cpu' else device.type}, {SAMPLES} samples; the paper does not "
        "print its batch. Times on a CPU are processor time of this process.",
        f"Full Hessians are formed while they take less than {size.hessian_gigabytes:g} GB.",
        f"The trace is estimated from {PROBES} products; the released code stops on the change of a running mean.",
        f"Training steps are those of {size.task}. The paper's cost is that of its full Hessian and a "
        "second forward pass.",
    ]


EXPERIMENT = Experiment(
    name="cost",
    summary="time and memory of kappa, and of a training step with it",
    paper="FAM paper, figures 4 and 5: the full Hessian of a layer of 16² to 256² weights in three ways "
    "(non-vectorised, vectorised, functorch) and its trace by Hutchinson to 1024²; in the text, 20 to 40 % above "
    "plain and SAM training, O(d² m²) a step.",
    run=run,
)
