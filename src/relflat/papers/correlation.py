"""Which measures of an output layer go with the generalisation gap, and which still do after rescaling?

The theory paper's study (Petzka et al. 2021, section 5): LeNet-5 on CIFAR-10, trained until the training loss is
below 0.1 under varied batch size, learning rate and weight decay. Rescaling neighbouring layers by random factors
leaves the function, and so the gap, as it is; a measure that moves under it loses what it says about the gap.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from relflat.lab.report.drawing import cloud, legend, log_if_wide
from relflat.papers.association import Association, associate
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Table
from relflat.papers.measures import MEASURES, Measure, Subject, pac_bayes, sam_sharpness
from relflat.papers.trained import (
    Recipe,
    Source,
    by_setting,
    grid,
    kept,
    named,
    samples,
    study,
    those_that_reached,
    trained,
)
from relflat.reparam import normalize_features, random_rescaling

FACTORS = (5.0, 25.0)
WHOLE_ON = 300  # training samples on which measures of the whole network are taken
OF_LAYER = ("kappa", "kappa_adaptive", "kappa_max", "layerwise", "trace", "lambda_max", "weight_norm")
OF_NETWORK = ("fisher_rao", "pac_bayes", "sam", "asam")


@torch.no_grad()
def kappa_max_dense(subject: Subject) -> float:
    """``sum_s ||w_s||^2 lambda_max(H_ss)`` of an output layer: ``H_ss = mean phi phi' p_s (1 - p_s)``, all of it."""
    phi, W = subject.inputs, subject.weight
    p = subject.model(phi).softmax(1)
    blocks = (torch.einsum("nt,n,nu->tu", phi, q * (1 - q), phi) / len(phi) for q in p.T)
    largest = [torch.linalg.eigvalsh(block)[-1] for block in blocks]
    return float((W.square().sum(1) * torch.stack(largest)).sum())


CHOSEN: dict[str, Measure] = {
    **{name: MEASURES[name] for name in (*OF_LAYER, *OF_NETWORK)},
    "kappa_max": replace(MEASURES["kappa_max"], of=kappa_max_dense),
    # fewer draws and steps than by default: ranks need no third digit
    "pac_bayes": replace(MEASURES["pac_bayes"], of=partial(pac_bayes, draws=5, rtol=1e-2)),
    "sam": replace(MEASURES["sam"], of=partial(sam_sharpness, steps=3)),
    "asam": replace(MEASURES["asam"], of=partial(sam_sharpness, rho=0.5, steps=3, adaptive=True)),
}
Record = dict[str, Any]
Found = dict[str, dict[str, Association]]


class View(NamedTuple):
    """A form in which the same functions are measured.

    Attributes:
        title: in tables.
        rescaled: layers multiplied by random factors first.
        normalised: features of the output layer divided by their standard deviation, its weight multiplied by it.
    """

    title: str
    rescaled: bool
    normalised: bool


VIEWS = {
    "normalised": View("normalised features", False, True),
    "as trained": View("as trained", False, False),
    "rescaled": View("rescaled", True, False),
    "rescaled, normalised": View("rescaled, then normalised", True, True),
}


def recipes(scale: str) -> list[Recipe]:
    """The networks of a study.

    Args:
        scale: ``"small"``: 27 networks on 2,000 pictures; ``"paper"``: ten seeds of each on all 50,000.
    """
    small = scale == "small"
    return grid(
        Source("cifar10", 2000 if small else None, 4000 if small else None),
        "lenet5",
        batch_sizes=(32, 64, 128),
        lrs=(0.003, 0.006, 0.012),
        weight_decays=(0.0, 1e-3, 1e-2),
        seeds=range(1 if small else 10),
        most_epochs=60 if small else 200,
    )


def study_one(folder: Path, recipe: Recipe) -> Record:
    """Train a network and measure it in every view, or read what was kept.

    Args:
        folder: where networks and measurements are kept.
        recipe: how the network is trained.

    Returns:
        Its result (see `Trained`) with ``measures`` by view and name, if its training loss reached the level.
    """
    network = trained(recipe, folder)
    if not network.result["reached"]:
        return network.result
    make = partial(measure, network.network, recipe)
    return {**network.result, "measures": kept(folder / f"{recipe.digest}-measures.json", make)}


def measure(network: nn.Sequential, recipe: Recipe) -> Record:
    """All measures on the training samples, by view and name.

    Those of the output layer need the features alone; those of the whole network, which the normalisation of one
    layer's features does not concern, are taken without it.
    """
    train = samples(recipe.source).train
    assert isinstance(train.inputs, Tensor)
    generator = torch.Generator().manual_seed(int(recipe.digest, 16))
    other = copy.deepcopy(network)
    random_rescaling(other, low=FACTORS[0], high=FACTORS[1], generator=generator)
    part = train.take(slice(WHOLE_ON))
    assert isinstance(part.inputs, Tensor)
    found = {}
    for name, view in VIEWS.items():
        base = other if view.rescaled else network
        at_layer = output_layer(base, train.inputs, train.targets, normalise=view.normalised)
        found[name] = {measure: CHOSEN[measure].of(at_layer) for measure in OF_LAYER}
        if not view.normalised:
            whole = Subject(base, part.inputs, part.targets, "output")
            found[name] |= {measure: CHOSEN[measure].of(whole) for measure in OF_NETWORK}
    return found


def output_layer(network: nn.Sequential, inputs: Tensor, targets: Tensor, *, normalise: bool) -> Subject:
    """The output layer as a network of its own on its features, in float64.

    A feature that never varies has no deviation to divide by. Normalised, it is no feature but a part of the bias;
    left among them, the weights of dead neurons would count, and rescaling would show.
    """
    with torch.no_grad():
        features = network[:-1](inputs).double()
    head = copy.deepcopy(network[-1]).double()
    assert isinstance(head, nn.Linear)
    if not normalise:
        return Subject(nn.Sequential(head), features, targets, "0")
    varies = features.std(0, correction=0) > 0
    less = nn.Linear(int(varies.sum()), head.out_features, dtype=torch.float64)
    with torch.no_grad():
        less.weight.copy_(head.weight[:, varies])
        less.bias.copy_(head(features[:1] * ~varies)[0])
    scale, layer = normalize_features(less, features[:, varies])
    return Subject(nn.Sequential(layer), scale(features[:, varies]), targets, "0")


def run(context: Context, only: Sequence[Recipe] | None = None) -> Outcome:
    """Train the networks, measure them in all views and see what goes with the gap.

    Args:
        context: scale, folders, workers.
        only: these networks in place of those of the scale.

    Raises:
        DataError: the data set was not fetched, or fewer than three networks reached the level.
    """
    networks = list(only or recipes(context.scale))
    return conclude(networks, study(context, "correlation", study_one, networks), context.scale)


def conclude(networks: Sequence[Recipe], records: Sequence[Record], scale: str) -> Outcome:
    """What the networks show.

    Raises:
        DataError: fewer than three networks reached the level.
    """
    done = those_that_reached(networks, records)
    found = associations(done)
    loss = associate([record["train_loss"] for record in done], [record["gap"] for record in done])
    lost = named(networks, records)
    return Outcome(
        findings=[
            *findings(found, loss),
            by_setting(done, [record["measures"]["normalised"]["kappa"] for record in done]),
            *([lost] if lost else []),
        ],
        tables=[table(found, loss, "tau"), table(found, loss, "r")],
        figures=[
            Figure(
                f"{CHOSEN[name].title} against the gap",
                partial(scatter, done, name),
                f"One point a network, n = {len(done)}; the same networks before and after rescaling.",
            )
            for name in ("kappa", "trace", "pac_bayes", "sam")
        ],
        scaled=scaled(networks, scale),
        data={
            "networks": list(records),
            "associations": {
                view: {name: pair.numbers for name, pair in pairs.items()} for view, pairs in found.items()
            },
            "training_loss": loss.numbers,
        },
    )


def associations(done: Sequence[Record]) -> Found:
    """Every measure with the gap, by view and name."""
    gaps = [record["gap"] for record in done]
    return {
        view: {
            name: associate([record["measures"][view][name] for record in done], gaps)
            for name in done[0]["measures"][view]
        }
        for view in VIEWS
    }


# -- in words ----------------------------------------------------------------------------------------------------


def findings(found: Found, loss: Association) -> list[str]:
    """What was reproduced, and what else one should know."""
    kappa = found["normalised"]["kappa"]
    n = kappa.n
    verdict = {
        1: "reproduced: kappa goes with the generalisation gap",
        0: "not reproduced: no association of kappa with the gap is shown",
        -1: "the opposite of the paper: flatter networks generalise worse",
    }[kappa.tau.sign]
    return [
        f"With normalised features Kendall's tau of kappa and the gap over {n} networks is {kappa.tau}, Pearson's r "
        f"{kappa.r}; {verdict}. With features as they are tau is {found['as trained']['kappa'].tau}.",
        beside(found),
        after_rescaling(found),
        normalisation(found),
        f"The training losses, all below the level but not equal, have tau {loss.tau} with the gap by themselves.",
    ]


def beside(found: Found) -> str:
    """How kappa compares with the other measures, before rescaling."""
    best = {**found["normalised"], **{name: found["as trained"][name] for name in OF_NETWORK}}
    order = sorted(best, key=lambda name: -best[name].tau.value)
    ranks = "; ".join(f"{CHOSEN[name].title} {best[name].tau.value:+.2f}" for name in order)
    place = order.index("kappa") + 1
    return (
        f"By tau, kappa is number {place} of {len(order)} measures before rescaling (layer measures with normalised "
        f"features): {ranks}. The intervals overlap widely, so this order is not to be relied on."
    )


def after_rescaling(found: Found) -> str:
    """Which measures keep what they say about the gap when layers are rescaled."""
    before, after = found["as trained"], found["rescaled"]
    kept_ones = [name for name in before if abs(before[name].tau.value - after[name].tau.value) < 0.01]
    lost = [name for name in before if before[name].tau.sign == 1 and after[name].tau.sign != 1]
    other = [name for name in before if name not in kept_ones and name not in lost]

    def listed(names: Sequence[str]) -> str:
        return (
            "; ".join(
                f"{CHOSEN[name].title} ({before[name].tau.value:+.2f} to {after[name].tau.value:+.2f})"
                for name in names
            )
            or "none"
        )

    return (
        f"Rescaling layers by factors of {FACTORS[0]:g} to {FACTORS[1]:g}, features not normalised, leaves tau "
        f"unchanged: {listed(kept_ones)}. Association no longer shown: {listed(lost)}. "
        f"Moved otherwise: {listed(other)}."
    )


def normalisation(found: Found) -> str:
    """What the normalisation of features does by itself."""
    before, after = found["normalised"], found["rescaled, normalised"]
    most = max(abs(before[name].tau.value - after[name].tau.value) for name in before)
    if most < 0.01:
        return (
            "Normalising the features undoes the rescaling for every measure of the output layer, Tr H and "
            "lambda_max too: with it, invariance does not set kappa apart."
        )
    return f"Normalised after rescaling, measures of the output layer still move by up to {most:.2f} in tau."


def table(found: Found, loss: Association, which: str) -> Table:
    """One coefficient of every measure in every view."""

    def cell(view: str, name: str) -> str:
        return str(getattr(found[view][name], which)) if name in found[view] else "-"

    rows = [(CHOSEN[name].title, *(cell(view, name) for view in VIEWS)) for name in CHOSEN]
    same = str(getattr(loss, which))
    rows.append(("training loss", same, same, same, same))
    kind = {"tau": "Kendall's tau", "r": "Pearson's r"}[which]
    return Table(
        f"{kind} with the generalisation gap",
        ("measure", *(view.title for view in VIEWS.values())),
        tuple(rows),
        f"n = {loss.n} networks, gap: test loss minus training loss. In brackets 95 % percentile bootstrap "
        "intervals over networks, each by itself. The last four measures are of the whole network, the others of the "
        "output layer.",
    )


def scatter(done: Sequence[Record], name: str, axes: Axes) -> None:
    """Paint gap against a measure before and after rescaling."""
    for place, view in enumerate(("as trained", "rescaled")):
        values = [record["measures"][view][name] for record in done]
        cloud(axes, values, [record["gap"] for record in done], 1 + place, view)
    axes.set_xlabel(CHOSEN[name].title)
    axes.set_ylabel("test loss − training loss")
    log_if_wide(axes, "x")
    legend(axes)


def scaled(networks: Sequence[Recipe], scale: str) -> list[str]:
    """What differs from the paper."""
    whole = (
        f"Measures of the whole network are taken on {WHOLE_ON} training pictures, those of the layer on all."
    )
    lists: dict[str, list[Any]] = {
        "batch sizes": sorted({recipe.batch_size for recipe in networks}),
        "learning rates": sorted({recipe.lr for recipe in networks}),
        "weight decays": sorted({recipe.weight_decay for recipe in networks}),
    }
    text = "; ".join(
        f"{what} {', '.join(f'{value:g}' for value in values)}" for what, values in lists.items()
    )
    found = [f"Our grid, in place of the paper's: {text}; SGD with momentum 0.9, He initialisation.", whole]
    if scale == "small":
        source = networks[0].source
        found.append(
            f"{source.train_size} training and {source.test_size} test pictures of {source.data}, one seed for each "
            f"of the {len(networks)} settings, where the paper has all pictures and ten runs each."
        )
    return found


EXPERIMENT = Experiment(
    name="correlation",
    summary="measures of an output layer against the generalisation gap, before and after rescaling",
    paper="Petzka et al. 2021, section 5: for LeNet-5 on CIFAR-10 relative flatness goes with the generalisation "
    "gap, and more closely than Tr H, the largest eigenvalue, the Fisher-Rao norm, PAC-Bayes flatness and the weight "
    "norm; after random rescaling of layers by factors of 5 to 25 the measures that are not invariant lose it.",
    run=run,
)
