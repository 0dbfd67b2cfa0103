"""Does kappa of a hidden layer follow the generalisation gap, and does the choice of layer matter?

The theory paper trains MLPs with four hidden layers on MNIST and finds about the same correlation for each layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from relflat import relative_flatness_by_layer
from relflat.papers.association import Association
from relflat.papers.experiment import Context, Outcome, Scale
from relflat.papers.network_study import Record, associations, completed, reached, recipes_of, study
from relflat.papers.painting import clouds
from relflat.papers.sheets import Sheet
from relflat.papers.trained import Recipe, samples

SHEET = Sheet("layers")
PAPER: Mapping[str, float] = SHEET["printed"]
HIDDEN = tuple(PAPER)
LAYERS = (*HIDDEN, "output")
FORMS = {"kappa": "features as they are", "normalised": "features divided by their deviation"}
recipes = partial(recipes_of, SHEET)


def measure(network: nn.Sequential, recipe: Recipe) -> Record:
    """Kappa of every layer on the training samples, of the features as they are and divided by their deviation.

    After the layer the network is piecewise linear, so that the Gauss-Newton curvature is the Hessian.
    """
    train = samples(recipe.source).train
    chunks = [slice(start, start + 1000) for start in range(0, len(train), 1000)]
    batches = [(train.take(chunk).inputs, train.targets[chunk]) for chunk in chunks]
    of_layers = partial(relative_flatness_by_layer, network, nn.CrossEntropyLoss(), batches, layer=list(LAYERS))
    plain, normalised = (
        of_layers(curvature="ggn", probes=SHEET["probes"], normalize_features=normalize)
        for normalize in (False, True)
    )
    return {
        "kappa": {name: flat.value for name, flat in plain.items()},
        "normalised": {name: flat.value for name, flat in normalised.items()},
        "stderr": {name: flat.stderr for name, flat in plain.items()},
    }


def run(context: Context) -> Outcome:
    """Train the networks, measure their layers and see how kappa goes with the gap."""
    networks = recipes(context.scale)
    return conclude(networks, study(context, "layers", networks, measure, suffix="layers-2"), context.scale)


def conclude(networks: Sequence[Recipe], records: Sequence[Record], scale: Scale) -> Outcome:
    """What the networks show."""
    done = reached(networks, records)
    found = associations(done, lambda record: {form: record[form] for form in FORMS})
    kappas = {layer: [record["kappa"][layer] for record in done] for layer in LAYERS}
    rows = [
        (
            layer,
            f"{PAPER[layer]:.2f}" if layer in PAPER else "-",
            *(str(each) for form in FORMS for each in (found[form][layer].tau, found[form][layer].r)),
        )
        for layer in LAYERS
    ]
    paint = partial(clouds, kappas, [record["gap"] for record in done], "kappa, training data")
    width = 128 if networks[0].network == "mlp-28x28" else 32
    values = {"source": networks[0].source, "level": networks[0].level, "width": width, "n": len(networks)}
    shown = Outcome(
        [finding(title, found[form]) for form, title in FORMS.items()],
        [SHEET.table("layers", rows, n=len(done))],
        [SHEET.figure("layers", paint, n=len(done))],
        SHEET.differs(scale, **values, probes=SHEET["probes"]),
        {},
    )
    return completed(shown, networks, records, kappas[HIDDEN[-1]], found)


def finding(form: str, pairs: Mapping[str, Association]) -> str:
    """In words, whether the hidden layers go with the gap."""
    hidden = [pairs[layer].tau for layer in HIDDEN]
    positive, negative = (sum(tau.sign == sign for tau in hidden) for sign in (1, -1))
    verdict = SHEET.say("reproduced")
    if positive < len(hidden):
        verdict = SHEET.say("not_reproduced", positive=positive, hidden=len(hidden))
        verdict += SHEET.say("against", negative=negative) if negative else ""
    values = [tau.value for tau in hidden]
    listed, spread = ", ".join(f"{value:+.2f}" for value in values), max(values) - min(values)
    return SHEET.say("finding", form=form, n=pairs["fc1"].n, values=listed, spread=spread, verdict=verdict)
