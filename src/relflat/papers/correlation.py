"""Which measures of an output layer go with the generalisation gap, and which still do after rescaling?

The theory paper's study (Petzka et al. 2021, section 5): LeNet-5 on CIFAR-10, trained until the training loss is
below 0.1 under varied batch size, learning rate and weight decay. Rescaling neighbouring layers by random factors
leaves the function, and so the gap, as it is; a measure that moves under it loses what it says about the gap.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relflat.papers.association import Association, associate
from relflat.papers.experiment import Context, Figure, Outcome, Scale, Table
from relflat.papers.measures import MEASURES, Measure, Subject, pac_bayes
from relflat.papers.network_study import SETTINGS, Found, Record, associations, completed, reached, recipes_of, study
from relflat.papers.painting import clouds
from relflat.papers.sheets import Sheet
from relflat.papers.trained import Recipe, samples
from relflat.reparam import normalize_features, random_rescaling

SHEET = Sheet("correlation")
OF_LAYER: tuple[str, ...] = SHEET["of_layer"]
OF_NETWORK: tuple[str, ...] = SHEET["of_network"]
KINDS = {"tau": "Kendall's tau", "r": "Pearson's r"}
recipes = partial(recipes_of, SHEET)


@torch.no_grad()
def kappa_max_dense(subject: Subject) -> float:
    """``sum_s ||w_s||^2 lambda_max(H_ss)`` of an output layer: ``H_ss = mean phi phi' p_s (1 - p_s)``, all of it."""
    phi, W = subject.inputs, subject.model.get_parameter("0.weight")
    p = subject.model(phi).softmax(1)
    blocks = (torch.einsum("nt,n,nu->tu", phi, q * (1 - q), phi) / len(phi) for q in p.T)
    largest = [torch.linalg.eigvalsh(block)[-1] for block in blocks]
    return float((W.square().sum(1) * torch.stack(largest)).sum())


CHOSEN: dict[str, Measure] = {
    **{name: MEASURES[name] for name in (*OF_LAYER, *OF_NETWORK)},
    "kappa_max": replace(MEASURES["kappa_max"], of=kappa_max_dense),
    # fewer draws than by default, and steps below: ranks need no third digit
    "pac_bayes": replace(MEASURES["pac_bayes"], of=partial(pac_bayes, draws=5, rtol=1e-2)),
}


class View(NamedTuple):
    """A form in which the same functions are measured."""

    title: str
    rescaled: bool  # layers multiplied by random factors first
    normalised: bool  # features of the output layer divided by their standard deviation, its weight multiplied by it


VIEWS = {name: View(**values) for name, values in SHEET["views"].items()}


def measure(network: nn.Sequential, recipe: Recipe) -> Record:
    """All measures on the training samples, by view and name.

    Those of the output layer need the features alone; those of the whole network, which the normalisation of one
    layer's features does not concern, are taken without it.
    """
    train, few = samples(recipe.source).train, SHEET["whole_on"]
    assert isinstance(train.inputs, Tensor)
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(int(recipe.digest, 16))
    random_rescaling(other, **SHEET["factors"], generator=generator)
    found = {}
    for name, view in VIEWS.items():
        base = other if view.rescaled else network
        at_layer = output_layer(base, train.inputs, train.targets, normalise=view.normalised)
        found[name] = {measure: CHOSEN[measure].of(at_layer) for measure in OF_LAYER}
        if not view.normalised:
            whole = Subject(base, train.inputs[:few], train.targets[:few], "output", steps=3)
            found[name] |= {measure: CHOSEN[measure].of(whole) for measure in OF_NETWORK}
    return found


def output_layer(network: nn.Sequential, inputs: Tensor, targets: Tensor, *, normalise: bool) -> Subject:
    """The output layer as a network of its own on its features, in float64.

    A feature that never varies has no deviation to divide by. Normalised, it is no feature but a part of the bias;
    left among them, the weights of dead neurons would count, and rescaling would show.
    """
    with torch.no_grad():
        features = network[:-1](inputs).double()
    output = copy.deepcopy(network[-1]).double()
    assert isinstance(output, nn.Linear)
    if not normalise:
        return Subject(nn.Sequential(output), features, targets, "0")
    varies = features.std(0, correction=0) > 0
    less = nn.Linear(int(varies.sum()), output.out_features, dtype=torch.float64)
    with torch.no_grad():
        less.weight.copy_(output.weight[:, varies])
        less.bias.copy_(output(features[:1] * ~varies)[0])
    scale, layer = normalize_features(less, features[:, varies])
    return Subject(nn.Sequential(layer), scale(features[:, varies]), targets, "0")


def run(context: Context) -> Outcome:
    """Train the networks, measure them in all views and see what goes with the gap."""
    networks = recipes(context.scale)
    records = study(context, "correlation", networks, measure, suffix="measures", key="measures")
    return conclude(networks, records, context.scale)


def conclude(networks: Sequence[Recipe], records: Sequence[Record], scale: Scale) -> Outcome:
    """What the networks show."""
    done = reached(networks, records)
    found = associations(done, lambda record: record["measures"])
    loss = associate([record["train_loss"] for record in done], [record["gap"] for record in done])
    grid = {key: sorted({getattr(recipe, key) for recipe in networks}) for key in SETTINGS}
    values = {key: ", ".join(f"{value:g}" for value in own) for key, own in grid.items()}
    size = {"source": networks[0].source, "whole_on": SHEET["whole_on"], "n": len(networks)}
    shown = Outcome(
        findings(found, loss),
        [table(found, loss, which) for which in KINDS],
        [figure(done, name) for name in ("kappa", "trace", "pac_bayes", "sam")],
        SHEET.differs(scale, **values, **size),
        {"training_loss": loss.numbers},
    )
    kappas = [record["measures"]["normalised"]["kappa"] for record in done]
    return completed(shown, networks, records, kappas, found)


def findings(found: Found, loss: Association) -> list[str]:
    """What was reproduced, and what else one should know."""
    kappa, as_trained = found["normalised"]["kappa"], found["as trained"]["kappa"].tau
    verdict = SHEET.say({1: "reproduced", 0: "not_reproduced", -1: "opposite"}[kappa.tau.sign])
    best = {**found["normalised"], **{name: found["as trained"][name] for name in OF_NETWORK}}
    order = sorted(best, key=lambda name: -best[name].tau.value)
    ranks = "; ".join(f"{CHOSEN[name].title} {best[name].tau.value:+.2f}" for name in order)
    after = found["rescaled, normalised"]
    most = max(abs(pair.tau.value - after[name].tau.value) for name, pair in found["normalised"].items())
    return [
        SHEET.say("kappa", n=kappa.n, tau=kappa.tau, r=kappa.r, verdict=verdict, as_trained=as_trained),
        SHEET.say("beside", place=order.index("kappa") + 1, n=len(order), ranks=ranks),
        after_rescaling(found),
        SHEET.say("undone" if most < 0.01 else "not_undone", most=most),
        SHEET.say("loss", tau=loss.tau),
    ]


def after_rescaling(found: Found) -> str:
    """Which measures keep what they say about the gap when layers are rescaled."""
    groups: dict[str, list[str]] = {"same": [], "lost": [], "moved": []}
    for name, pair in found["as trained"].items():
        before, after = pair.tau, found["rescaled"][name].tau
        same, lost = abs(before.value - after.value) < 0.01, before.sign == 1 and after.sign != 1
        text = f"{CHOSEN[name].title} ({before.value:+.2f} to {after.value:+.2f})"
        for key, within in (("same", same), ("lost", lost), ("moved", not same and not lost)):
            groups[key] += [text] * within
    listed = {key: "; ".join(texts) or "none" for key, texts in groups.items()}
    return SHEET.say("rescaled", **SHEET["factors"], **listed)


def table(found: Found, loss: Association, which: str) -> Table:
    """One coefficient of every measure in every view."""

    def cell(view: str, name: str) -> str:
        return str(getattr(found[view][name], which)) if name in found[view] else "-"

    rows = [(CHOSEN[name].title, *(cell(view, name) for view in VIEWS)) for name in CHOSEN]
    rows.append(("training loss", *[str(getattr(loss, which))] * len(VIEWS)))
    titles = [view.title for view in VIEWS.values()]
    return SHEET.table("coefficients", rows, titles, kind=KINDS[which], n=loss.n)


def figure(done: Sequence[Record], name: str) -> Figure:
    """Gap against a measure before and after rescaling."""
    values = {view: [record["measures"][view][name] for record in done] for view in ("as trained", "rescaled")}
    title = CHOSEN[name].title
    paint = partial(clouds, values, [record["gap"] for record in done], title, first=1)
    return SHEET.figure("measure", paint, measure=title, n=len(done))
