"""Which measures see a change of the weights that leaves the function as it is?

The theory paper asks a measure of flatness not to (Petzka et al. 2021, sections 4 and 5). Five kinds of such changes
are made to trained networks, with factors from 5 to 25 as there, and every measure is taken before and after, in
double precision, next to what the theory says of it.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from relflat import reparam
from relflat.papers.experiment import Context, Outcome, Scale, Table
from relflat.papers.measures import MEASURES, Subject
from relflat.papers.network_study import Record, named, recipes_of, study
from relflat.papers.painting import COLOURS, MARKERS
from relflat.papers.sheets import Sheet
from relflat.papers.trained import Recipe, samples

SHEET = Sheet("invariance")
LOW, HIGH = SHEET["factors"].values()
SAME: float = SHEET["same"]
recipes = partial(recipes_of, SHEET)


# The changes leave the function as it is; each returns the name that the layer has then.


def factors(k: int, generator: torch.Generator) -> Tensor:
    """Random factors, uniform from ``LOW`` to ``HIGH``."""
    return LOW + (HIGH - LOW) * torch.rand(k, generator=generator, dtype=torch.float64)


def linear(net: nn.Sequential, layer: str) -> nn.Linear:
    """The linear layer of this name."""
    module = net.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    return module


def rescale_layers(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """Each layer against the next by one factor."""
    reparam.random_rescaling(net, low=LOW, high=HIGH, generator=generator)
    return layer


def rescale_neurons(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """The layer's own output neurons against the next layer, each by a factor of its own."""
    names = list(net._modules)
    later = names[names.index(layer) + 1 :]
    after = next(name for name in later if isinstance(net.get_submodule(name), nn.Linear))
    between = [net.get_submodule(name) for name in later[: later.index(after)]]
    first = linear(net, layer)
    reparam.rescale_neurons(first, between, linear(net, after), factors(first.out_features, generator))
    return layer


def rescale_features(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """The layer's input features, each by a factor of its own."""
    module = linear(net, layer)
    setattr(net, layer, reparam.rescale_features(module, factors(module.in_features, generator)))
    return f"{layer}.1"


def rotate_features(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """The layer's input features by a random rotation, which is not a parameter."""
    module = linear(net, layer)
    square = torch.randn(module.in_features, module.in_features, generator=generator, dtype=torch.float64)
    rotated = reparam.rotate_features(module, torch.linalg.qr(square).Q)
    rotated[0].requires_grad_(False)
    setattr(net, layer, rotated)
    return f"{layer}.1"


def shift_rows(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """One vector to all rows of the output weight, which softmax does not see."""
    module = linear(net, layer)
    vector = torch.randn(module.in_features, generator=generator, dtype=torch.float64)
    reparam.shift_rows(module, vector, nn.CrossEntropyLoss)
    return layer


CHANGES = {
    change.__name__: change
    for change in (rescale_layers, rescale_neurons, rescale_features, rotate_features, shift_rows)
}


@dataclass(frozen=True)
class Case:
    """A change at a layer, and what the theory says of it."""

    title: str
    change: str  # name of the function that makes it
    hidden: bool  # at the hidden layer; else at the output layer
    same: tuple[str, ...]  # the measures that must not see it; the others must
    draws: tuple[str, ...] = ()  # those that do not see it on average, but whose few draws of noise do

    def answer(self, measure: str) -> Literal["same", "changes", "draws"]:
        """What the theory says of a measure."""
        return "same" if measure in self.same else "draws" if measure in self.draws else "changes"


@dataclass(frozen=True)
class Size:
    """What is measured at one scale: the name of the hidden layer, and how many training samples are measured on."""

    hidden: str
    samples: int


CASES = {name: Case(hidden=name.endswith("hidden"), **values) for name, values in SHEET["cases"].items()}
SIZES = SHEET.sizes(Size)


def measure(size: Size, network: nn.Sequential, recipe: Recipe) -> Record:
    """Every measure before and after every change, and how far the function moved."""
    part = samples(recipe.source).train.take(slice(size.samples))
    assert isinstance(part.inputs, Tensor)
    inputs = part.inputs.double()
    base = copy.deepcopy(network).double().eval()

    def measures(model: nn.Module, layer: str) -> dict[str, float]:
        subject = Subject(model, inputs, part.targets, layer)
        return {name: measure.of(subject) for name, measure in MEASURES.items()}

    before = {layer: measures(base, layer) for layer in ("output", size.hidden)}
    found = {}
    for place, (name, case) in enumerate(CASES.items()):
        changed = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(1000 * recipe.seed + place)
        layer = size.hidden if case.hidden else "output"
        renamed = CHANGES[case.change](changed, layer, generator)
        with torch.no_grad():
            moved = float((changed(inputs).softmax(1) - base(inputs).softmax(1)).abs().max())
        found[name] = {"moved": moved, "before": before[layer], "after": measures(changed, renamed)}
    return found


def run(context: Context) -> Outcome:
    """Train the networks and measure them before and after every change; DataError: the data were not fetched."""
    size, networks = SIZES[context.scale], recipes(context.scale)
    suffix = f"{size.hidden}-{size.samples}"
    records = study(context, "invariance", networks, partial(measure, size), suffix=suffix, key="cases")
    return conclude(networks, records, context.scale)


Cases = Sequence[Mapping[str, Any]]  # of each network
Changes = Mapping[str, Mapping[str, float]]


def changes(cases: Cases) -> Changes:
    """Largest relative change over the networks, by case and measure."""

    def relative(before: float, after: float) -> float:
        return abs(after / before - 1) if before else math.inf if after else 0.0

    return {
        name: {
            measure: max(relative(each[name]["before"][measure], each[name]["after"][measure]) for each in cases)
            for measure in MEASURES
        }
        for name in CASES
    }


def conclude(networks: Sequence[Recipe], records: Sequence[Record], scale: Scale) -> Outcome:
    """What moved, and what the theory says."""
    lost = named(networks, records)
    cases = [record["cases"] for record in records if record["reached"]]
    if not cases:
        return Outcome(lost, [], [], [], {"networks": list(records)})
    found = changes(cases)
    moved = max(case["moved"] for each in cases for case in each.values())
    return Outcome(
        findings=[*findings(cases, found, moved), *lost],
        tables=tables(found),
        figures=[
            SHEET.figure("changes", partial(dots, found, place), place=place, same=SAME)
            for place in ("output", "hidden")
        ],
        scaled=SHEET.differs(scale, samples=SIZES[scale].samples, n=len(networks)),
        data={"changes": found, "moved": moved, "networks": list(records)},
    )


def tables(found: Changes) -> list[Table]:
    """Which measures see which change, and the numbers behind it."""
    titles = [case.title for case in CASES.values()]
    answers = [
        (each.title, *(seen(found, name, key) for name in CASES), each.source) for key, each in MEASURES.items()
    ]
    sizes = [(each.title, *(f"{found[name][key]:.1e}" for name in CASES)) for key, each in MEASURES.items()]
    return [SHEET.table("answers", answers, [*titles, "from"], same=SAME), SHEET.table("changes", sizes, titles)]


def seen(found: Changes, name: str, measure: str) -> str:
    """Whether a measure sees a change, and whether the theory says otherwise."""
    result, answer = "same" if found[name][measure] <= SAME else "changes", CASES[name].answer(measure)
    if answer == "draws":
        return f"{result} (draws of noise)"
    return result if result == answer else f"{result} (theory: {answer})"


def findings(cases: Cases, found: Changes, moved: float) -> list[str]:
    """Whether every measure behaves as the theory says, and the exceptions."""
    pairs = [(name, measure) for name in CASES for measure in MEASURES]
    n = sum(CASES[name].answer(measure) != "draws" for name, measure in pairs)
    wrong = [
        f"{MEASURES[measure].title}, {CASES[name].title} ({found[name][measure]:.1e})"
        for name, measure in pairs
        if "theory" in seen(found, name, measure)
    ]
    unlike = f"; not so: {'; '.join(wrong)}" if wrong else ""
    worst = max(found[name]["kappa"] for name in CASES if CASES[name].answer("kappa") == "same")
    output, hidden = (found[f"features, {place}"]["kappa"] for place in ("output", "hidden"))
    others = [
        f"{MEASURES[measure].title} by a factor of up to {factor(cases, 'layers, output', measure):,.0f}"
        for measure in ("trace", "lambda_max", "weight_norm", "pac_bayes", "sam")
    ]
    return [
        SHEET.say("pairs", right=n - len(wrong), n=n, networks=len(cases), wrong=unlike, moved=moved),
        SHEET.say("kappa", worst=worst, output=output, hidden=hidden),
        SHEET.say("others", others=", ".join(others)),
    ]


def factor(cases: Cases, name: str, measure: str) -> float:
    """Largest ratio of after and before, whichever is larger on top."""
    both = [(each[name]["before"][measure], each[name]["after"][measure]) for each in cases]
    ratios = [after / before for before, after in both if before > 0]
    return max((max(r, 1 / r) if r > 0 else math.inf for r in ratios), default=math.nan)


def dots(found: Changes, place: str, axes: Axes) -> None:
    """Paint the changes of every measure at one layer."""
    names = [name for name in CASES if name.endswith(place)]
    order = list(MEASURES)[::-1]
    for number, name in enumerate(names):
        shift = 0.15 * (number - (len(names) - 1) / 2)
        axes.plot(
            [max(found[name][measure], 1e-16) for measure in order],
            [row + shift for row in range(len(order))],
            linestyle="",
            markersize=5,
            marker=MARKERS[number],
            color=COLOURS[1 + number],
            label=name.split(",")[0],
        )
    axes.axvline(SAME, color=COLOURS[0], linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(order)), [MEASURES[measure].title for measure in order])
    axes.set_xlabel("relative change (log)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, handletextpad=0.2, columnspacing=0.8)
