"""Which measures see a change of the weights that leaves the function as it is?

The theory paper asks a measure of flatness not to (Petzka et al. 2021, sections 4 and 5). Five kinds of such changes
are made to trained networks, with factors from 5 to 25 as there, and every measure is taken before and after, in
double precision, next to what the theory says of it.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from relflat import reparam
from relflat.lab.report.drawing import COLOURS, MARKERS
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Scale, Table
from relflat.papers.measures import MEASURES, Subject
from relflat.papers.trained import Recipe, Source, kept, named, samples, study, trained

LOW, HIGH = 5.0, 25.0
SAME = 1e-6  # largest relative change that counts as none
Answer = Literal["same", "changes", "draws"]
Change = Callable[[nn.Sequential, str, torch.Generator], str]


# -- changes that leave the function as it is ------------------------------------------------------------------------


def factors(k: int, generator: torch.Generator) -> Tensor:
    """Random factors, uniform from ``LOW`` to ``HIGH``."""
    return LOW + (HIGH - LOW) * torch.rand(k, generator=generator, dtype=torch.float64)


def rescale_layers(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """Each layer against the next by one factor."""
    reparam.random_rescaling(net, low=LOW, high=HIGH, generator=generator)
    return layer


def rescale_neurons(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """The layer's own output neurons against the next layer, each by a factor of its own."""
    names = list(net._modules)
    place = names.index(layer)
    after = next(name for name in names[place + 1 :] if isinstance(net.get_submodule(name), nn.Linear))
    between = [net.get_submodule(name) for name in names[place + 1 : names.index(after)]]
    first, second = net.get_submodule(layer), net.get_submodule(after)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    reparam.rescale_neurons(first, between, second, factors(first.out_features, generator))
    return layer


def rescale_features(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """The layer's input features, each by a factor of its own."""
    module = net.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    setattr(net, layer, reparam.rescale_features(module, factors(module.in_features, generator)))
    return f"{layer}.1"


def rotate_features(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """The layer's input features by a random rotation, which is not a parameter."""
    module = net.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    square = torch.randn(module.in_features, module.in_features, generator=generator, dtype=torch.float64)
    rotated = reparam.rotate_features(module, torch.linalg.qr(square).Q)
    rotated[0].requires_grad_(False)
    setattr(net, layer, rotated)
    return f"{layer}.1"


def shift_rows(net: nn.Sequential, layer: str, generator: torch.Generator) -> str:
    """One vector to all rows of the output weight, which softmax does not see."""
    module = net.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    vector = torch.randn(module.in_features, generator=generator, dtype=torch.float64)
    reparam.shift_rows(module, vector, nn.CrossEntropyLoss)
    return layer


@dataclass(frozen=True)
class Case:
    """A change at a layer, and what the theory says of it.

    Attributes:
        title: in tables.
        change: makes it.
        hidden: at the hidden layer; else at the output layer.
        same: the measures that must not see it; the others must.
        draws: those that do not see it on average, but whose few draws of noise do.
    """

    title: str
    change: Change
    hidden: bool
    same: frozenset[str]
    draws: frozenset[str] = frozenset()

    def answer(self, measure: str) -> Answer:
        """What the theory says of a measure."""
        return "same" if measure in self.same else "draws" if measure in self.draws else "changes"


KAPPAS = frozenset(("kappa", "kappa_normalized", "kappa_adaptive"))
ELEMENTWISE = frozenset(("fisher_rao", "asam"))
OF_LAYER = frozenset(("layerwise", "kappa_max"))
SCALED = KAPPAS | ELEMENTWISE | OF_LAYER
ROTATED = frozenset(("kappa", "trace", "lambda_max", "weight_norm", "fisher_rao", "sam")) | OF_LAYER
CASES = {
    "layers, output": Case("layers, at the output", rescale_layers, False, SCALED),
    "layers, hidden": Case("layers, at a hidden one", rescale_layers, True, SCALED),
    "neurons, hidden": Case(
        "own neurons, hidden layer", rescale_neurons, True, KAPPAS | ELEMENTWISE | {"kappa_max"}
    ),
    "features, output": Case(
        "features of the output layer",
        rescale_features,
        False,
        ELEMENTWISE | {"kappa_normalized", "kappa_adaptive"},
    ),
    "features, hidden": Case(
        "features of a hidden layer",
        rescale_features,
        True,
        ELEMENTWISE | {"kappa_normalized", "kappa_adaptive"},
    ),
    "rotation, output": Case(
        "rotated features, output layer", rotate_features, False, ROTATED, frozenset(("pac_bayes",))
    ),
    "shift, output": Case(
        "one vector to all rows, output",
        shift_rows,
        False,
        KAPPAS | {"trace", "lambda_max", "fisher_rao", "pac_bayes", "sam"},
    ),
}


# -- the experiment ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What is measured at one scale.

    Attributes:
        recipes: the networks.
        hidden: name of the hidden layer.
        samples: training samples that measures are taken on.
    """

    recipes: tuple[Recipe, ...]
    hidden: str
    samples: int


SIZES: dict[Scale, Size] = {
    "small": Size(
        tuple(
            Recipe(Source("digits", held_out=500), "mlp-8x8", 32, 0.02, 0.0, seed, level=0.05)
            for seed in range(5)
        ),
        "fc4",
        500,
    ),
    "paper": Size(
        tuple(
            Recipe(Source("cifar10"), "lenet5", 64, 0.01, 0.0, seed, most_epochs=200) for seed in range(10)
        ),
        "fc2",
        2000,
    ),
}


def study_one(size: Size, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Train a network and measure it before and after every change, or read what was kept."""
    network = trained(recipe, folder)
    if not network.result["reached"]:
        return network.result
    path = folder / f"{recipe.digest}-{size.hidden}-{size.samples}.json"
    return {**network.result, "cases": kept(path, partial(measure, network.network, size, recipe))}


def measure(network: nn.Sequential, size: Size, recipe: Recipe) -> dict[str, Any]:
    """Every measure before and after every change, and how far the function moved."""
    part = samples(recipe.source).train.take(slice(size.samples))
    assert isinstance(part.inputs, Tensor)
    inputs = part.inputs.double()
    base = copy.deepcopy(network).double().eval()
    layers = {True: size.hidden, False: "output"}
    before = {hidden: all_measures(Subject(base, inputs, part.targets, layers[hidden])) for hidden in layers}
    found = {}
    for place, (name, case) in enumerate(CASES.items()):
        changed = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(1000 * recipe.seed + place)
        layer = case.change(changed, layers[case.hidden], generator)
        with torch.no_grad():
            moved = (changed(inputs).softmax(1) - base(inputs).softmax(1)).abs().max()
        found[name] = {
            "moved": float(moved),
            "before": before[case.hidden],
            "after": all_measures(Subject(changed, inputs, part.targets, layer)),
        }
    return found


def all_measures(subject: Subject) -> dict[str, float]:
    """All of ``MEASURES`` of one network at one layer."""
    return {name: measure.of(subject) for name, measure in MEASURES.items()}


def run(context: Context) -> Outcome:
    """Train the networks and measure them before and after every change.

    Raises:
        DataError: the data set was not fetched.
    """
    size = SIZES[context.scale]
    records = study(context, "invariance", partial(study_one, size), size.recipes)
    return conclude(size, records, context.scale)


Changes = Mapping[str, Mapping[str, float]]


def changes(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Largest relative change over the networks, by case and measure."""
    cases = [record["cases"] for record in records if record["reached"]]
    return {
        name: {
            measure: max(
                relative(each[name]["before"][measure], each[name]["after"][measure]) for each in cases
            )
            for measure in MEASURES
        }
        for name in CASES
    }


def relative(before: float, after: float) -> float:
    """``|after / before - 1|``."""
    return abs(after / before - 1) if before else math.inf if after else 0.0


def conclude(size: Size, records: Sequence[Mapping[str, Any]], scale: Scale) -> Outcome:
    """What moved, and what the theory says."""
    if not any(record["reached"] for record in records):
        return Outcome([named(size.recipes, records)], [], [], [], {"networks": list(records)})
    found = changes(records)
    moved = max(case["moved"] for record in records if record["reached"] for case in record["cases"].values())
    return Outcome(
        findings=findings(size, records, found, moved),
        tables=[table(found), magnitudes(found)],
        figures=[
            Figure(
                f"Largest relative change, {place} layer",
                partial(dots, found, place),
                f"Over the networks, on a logarithmic scale; 0 is drawn at 1e-16. Left of the line, {SAME:g}, a "
                "measure does not see the change.",
            )
            for place in ("output", "hidden")
        ],
        scaled=scaled(size, scale),
        data={"changes": found, "moved": moved, "networks": list(records)},
    )


def findings(size: Size, records: Sequence[Mapping[str, Any]], found: Changes, moved: float) -> list[str]:
    """Whether every measure behaves as the theory says, and the exceptions."""
    pairs = [(name, measure) for name in CASES for measure in MEASURES]
    definite = [(name, measure) for name, measure in pairs if CASES[name].answer(measure) != "draws"]
    wrong = [
        f"{MEASURES[measure].title}, {CASES[name].title} ({found[name][measure]:.1e})"
        for name, measure in definite
        if (found[name][measure] <= SAME) != (CASES[name].answer(measure) == "same")
    ]
    count = sum(bool(record["reached"]) for record in records)
    worst = max(found[name]["kappa"] for name in CASES if CASES[name].answer("kappa") == "same")
    others = [
        f"{MEASURES[measure].title} by a factor of up to {factor(records, 'layers, output', measure):,.0f}"
        for measure in ("trace", "lambda_max", "weight_norm", "pac_bayes", "sam")
    ]
    lines = [
        f"{len(definite) - len(wrong)} of {len(definite)} pairs of a measure and a change come out as the theory "
        f"says on {count} networks"
        + (f"; not so: {'; '.join(wrong)}." if wrong else ".")
        + f" No change moved a probability by more than {moved:.1e}.",
        "kappa is invariant to the scale of layers, of the layer's own neurons, to rotations of its features and "
        f"to a vector added to all rows of the output weight, to {worst:.0e}. It is not invariant to the scale of "
        f"single input features: it changes by {found['features, output']['kappa']:.2g} of itself at the output and "
        f"{found['features, hidden']['kappa']:.2g} at the hidden layer; features divided by their deviation, or the "
        "adaptive form, repair that and lose the invariance to rotations.",
        f"Rescaled layers with the same function change {', '.join(others)}; the Fisher-Rao norm and "
        "ASAM's sharpness do not change.",
    ]
    lost = named(size.recipes, records)
    return [*lines, lost] if lost else lines


def factor(records: Sequence[Mapping[str, Any]], case: str, measure: str) -> float:
    """Largest ratio of after and before, whichever is larger on top."""
    ratios = [
        record["cases"][case]["after"][measure] / record["cases"][case]["before"][measure]
        for record in records
        if record["reached"] and record["cases"][case]["before"][measure] > 0
    ]
    return max((max(r, 1 / r) if r > 0 else math.inf for r in ratios), default=math.nan)


def table(found: Changes) -> Table:
    """Which measures see which change, and where the theory says otherwise."""
    rows = []
    for measure, record in MEASURES.items():
        cells = []
        for name, case in CASES.items():
            same, answer = found[name][measure] <= SAME, case.answer(measure)
            cell = "same" if same else "changes"
            if answer == "draws":
                cell += " (draws of noise)"
            elif same != (answer == "same"):
                cell += f" (theory: {answer})"
            cells.append(cell)
        rows.append((record.title, *cells, record.source))
    return Table(
        "Who sees what",
        ("measure", *(case.title for case in CASES.values()), "from"),
        tuple(rows),
        f"same: the relative change is at most {SAME:g} on every network. “Draws of noise”: the measure is the same "
        "in distribution, and its ten draws are not.",
    )


def magnitudes(found: Changes) -> Table:
    """The numbers behind it."""
    return Table(
        "Largest relative change",
        ("measure", *(case.title for case in CASES.values())),
        tuple(
            (record.title, *(f"{found[name][measure]:.1e}" for name in CASES))
            for measure, record in MEASURES.items()
        ),
        "|after / before − 1|, largest over the networks, double precision.",
    )


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


def scaled(size: Size, scale: Scale) -> list[str]:
    """What differs from the paper."""
    lines = [
        f"Measures are taken on {size.samples} training samples. The theory paper shows the correlation with the gap "
        "after rescaling; the experiment `correlation` has that.",
        "Features that never vary (dead neurons) are left out where features are divided by their deviation.",
        "PAC-Bayes flatness by ten draws of noise; SAM's sharpness by ten steps of ascent, a lower bound of the "
        "maximum.",
    ]
    if scale == "small":
        lines.append(
            f"{len(size.recipes)} MLPs with four hidden layers of 32 on scikit-learn's digits, where the paper has "
            "LeNet-5 on CIFAR-10."
        )
    return lines


EXPERIMENT = Experiment(
    name="invariance",
    summary="which measures see a change of the weights that leaves the function as it is",
    paper="Petzka et al. 2021, sections 4 and 5: relative flatness does not change when layers or neurons of a ReLU "
    "network are rescaled, Tr H, largest eigenvalue and weight norm do; layers rescaled by factors of 5 to 25.",
    run=run,
)
