"""Does kappa of a hidden layer follow the generalisation gap, and does the choice of layer matter?

The theory paper trains MLPs with four hidden layers on MNIST and finds about the same correlation for each layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from torch import nn

from relflat import relative_flatness_by_layer
from relflat.lab.report.drawing import cloud, legend, log_if_wide
from relflat.papers.association import Association, associate
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Table
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

LAYERS = ("fc1", "fc2", "fc3", "fc4", "output")
HIDDEN = LAYERS[:4]
PAPER = dict(zip(HIDDEN, (0.73, 0.70, 0.72, 0.71), strict=True))
PROBES = 32
Record = dict[str, Any]


def recipes(scale: str) -> list[Recipe]:
    """The networks of a study.

    Args:
        scale: ``"small"``: 27 networks on 1,000 pictures; ``"paper"``: ten seeds of each on all 60,000.
    """
    small = scale == "small"
    return grid(
        Source("fashion-mnist", 1000 if small else None, 4000 if small else None),
        "mlp-28x28",
        batch_sizes=(32, 64, 128),
        lrs=(0.003, 0.01, 0.03),
        weight_decays=(0.0, 1e-3, 1e-2),
        seeds=range(1 if small else 10),
        most_epochs=100,
    )


def study_one(folder: Path, recipe: Recipe) -> Record:
    """Train a network and measure its layers, or read what was kept.

    Args:
        folder: where networks and measurements are kept.
        recipe: how the network is trained.

    Returns:
        Its result (see `Trained`) with ``kappa``, ``normalised`` and ``stderr`` (of ``kappa``) by layer, the last
        three only if its training loss reached the level.
    """
    network = trained(recipe, folder)
    if not network.result["reached"]:
        return network.result
    found = kept(folder / f"{recipe.digest}-layers-2.json", partial(measure, network.network, recipe))
    return {**network.result, **found}


def measure(network: nn.Sequential, recipe: Recipe) -> Record:
    """Kappa of every layer on the training samples, of the features as they are and divided by their deviation.

    After the layer the network is piecewise linear, so that the Gauss-Newton curvature is the Hessian.
    """
    train = samples(recipe.source).train
    batches = [
        (train.take(slice(start, start + 1000)).inputs, train.targets[start : start + 1000])
        for start in range(0, len(train), 1000)
    ]
    plain, normalised = (
        relative_flatness_by_layer(
            network,
            nn.CrossEntropyLoss(),
            batches,
            layer=list(LAYERS),
            curvature="ggn",
            probes=PROBES,
            normalize_features=normalize,
        )
        for normalize in (False, True)
    )
    return {
        "kappa": {name: flat.value for name, flat in plain.items()},
        "normalised": {name: flat.value for name, flat in normalised.items()},
        "stderr": {name: flat.stderr for name, flat in plain.items()},
    }


def run(context: Context, only: Sequence[Recipe] | None = None) -> Outcome:
    """Train the networks, measure their layers and see how kappa goes with the gap.

    Args:
        context: scale, folders, workers.
        only: these networks in place of those of the scale.

    Raises:
        DataError: the data set was not fetched, or fewer than three networks reached the level.
    """
    networks = list(only or recipes(context.scale))
    return conclude(networks, study(context, "layers", study_one, networks), context.scale)


def conclude(networks: Sequence[Recipe], records: Sequence[Record], scale: str) -> Outcome:
    """What the networks show.

    Raises:
        DataError: fewer than three networks reached the level.
    """
    done = those_that_reached(networks, records)
    gaps = [record["gap"] for record in done]
    found = {
        form: {layer: associate([record[form][layer] for record in done], gaps) for layer in LAYERS}
        for form in ("kappa", "normalised")
    }
    lost = named(networks, records)
    return Outcome(
        findings=[
            *findings(found["kappa"], found["normalised"]),
            by_setting(done, [record["kappa"][HIDDEN[-1]] for record in done]),
            *([lost] if lost else []),
        ],
        tables=[table(found["kappa"], found["normalised"])],
        figures=[
            Figure(
                "Kappa of each layer against the gap",
                partial(scatter, done),
                f"One point a network and layer, n = {len(done)} networks; features as they are.",
            )
        ],
        scaled=scaled(networks, scale),
        data={
            "networks": list(records),
            "associations": {
                form: {layer: pair.numbers for layer, pair in layers.items()}
                for form, layers in found.items()
            },
        },
    )


def findings(plain: Mapping[str, Association], normalised: Mapping[str, Association]) -> list[str]:
    """In words."""
    n = plain["fc1"].n
    found = []
    for form, pairs in (("features as they are", plain), ("features divided by their deviation", normalised)):
        hidden = [pairs[layer] for layer in HIDDEN]
        positive, negative = (sum(pair.tau.sign == sign for pair in hidden) for sign in (1, -1))
        values = ", ".join(f"{pair.tau.value:+.2f}" for pair in hidden)
        verdict = (
            "reproduced: every hidden layer goes with the gap"
            if positive == len(hidden)
            else f"not reproduced: {positive} of {len(hidden)} hidden layers are shown to go with the gap"
            + (f", and {negative} against it" if negative else "")
        )
        spread = max(pair.tau.value for pair in hidden) - min(pair.tau.value for pair in hidden)
        found.append(
            f"With {form}, Kendall's tau of kappa and the generalisation gap over {n} networks is {values} for the "
            f"hidden layers from the first to the last (they differ by up to {spread:.2f}); {verdict}."
        )
    return found


def table(plain: Mapping[str, Association], normalised: Mapping[str, Association]) -> Table:
    """Both coefficients of every layer."""
    return Table(
        "Kappa of a layer and the generalisation gap",
        ("layer", "paper", "tau", "r", "tau, normalised features", "r, normalised features"),
        tuple(
            (
                layer,
                f"{PAPER[layer]:.2f}" if layer in PAPER else "-",
                str(plain[layer].tau),
                str(plain[layer].r),
                str(normalised[layer].tau),
                str(normalised[layer].r),
            )
            for layer in LAYERS
        ),
        f"n = {plain['fc1'].n} networks. tau: Kendall's tau-b; r: Pearson; in brackets 95 % percentile bootstrap "
        "intervals over networks, each by itself.",
    )


def scatter(done: Sequence[Record], axes: Axes) -> None:
    """Paint gap against kappa, a colour for each layer."""
    for place, layer in enumerate(LAYERS):
        kappas = [record["kappa"][layer] for record in done]
        cloud(axes, kappas, [record["gap"] for record in done], place, layer)
    axes.set_xlabel("kappa, training data")
    axes.set_ylabel("test loss − training loss")
    log_if_wide(axes, "x")
    legend(axes)


def scaled(networks: Sequence[Recipe], scale: str) -> list[str]:
    """What differs from the paper."""
    source = networks[0].source
    found = [
        f"{source.data} in place of MNIST; "
        f"four hidden layers of ReLU, width {'128' if networks[0].network == 'mlp-28x28' else '32'}.",
        "SGD with momentum 0.9 at a constant rate until the training loss is below "
        f"{networks[0].level:g}, He initialisation, under our grid of batch size, learning rate and weight decay.",
        "Kappa of hidden layers by "
        f"{PROBES} Gauss-Newton probes; for ReLU networks that is the Hessian's, up to the probes' error.",
    ]
    if scale == "small":
        found.append(
            f"{len(networks)} networks on {source.train_size} training pictures, one seed for each setting; the gap "
            f"is taken on {source.test_size} test pictures."
        )
    return found


EXPERIMENT = Experiment(
    name="layers",
    summary="kappa of every layer of an MLP against the generalisation gap",
    paper="Petzka et al. 2021: correlation of kappa and gap .73, .70, .72, .71 for the four hidden layers of MLPs on "
    "MNIST.",
    run=run,
)
