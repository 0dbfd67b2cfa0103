"""Draw the figures of docs/ten-minutes.md from networks trained here: python docs/figures/draw.py [NAME ...]."""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, loss_along, measures, plot, relative_flatness, reparam
from relflat.plot.style import COLOURS, STYLE

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
x, y, x_test, y_test = x[:900], y[:900], x[900:], y[900:]
cross_entropy = nn.CrossEntropyLoss()
GREY, ORANGE, BLUE, GREEN, PINK, _ = COLOURS


def network(seed: int = 0) -> nn.Sequential:
    """An MLP for the 8x8 digits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(
    model: nn.Module,
    epochs: int,
    targets: torch.Tensor,
    criterion: nn.Module = cross_entropy,
    after: Callable[[], None] = lambda: None,
) -> None:
    """SGD with momentum; ``after`` is called before training and after each epoch, in evaluation mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    after()
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(50):
            loss = criterion(model(x[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        after()


def noisy(seed: int) -> torch.Tensor:
    """The labels, a fifth of them redrawn."""
    random = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(len(y), generator=random) < 0.2, torch.randint(10, y.shape, generator=random), y)


def kappa(points: int = 13) -> Figure:
    """The loss along random linear changes of a layer's features: kappa is its curvature."""
    plain, flat = network(), network()
    targets = noisy(0)
    train(plain, 10, targets)
    train(flat, 10, targets, FAM(cross_entropy, flat))
    along = {
        name: loss_along(model, cross_entropy, (x, targets), layer="2", radius=0.3, points=points)
        for name, model in (("plain", plain), ("with FAM", flat))
    }
    return plot.landscape(along, rise=True).figure


def invariance(steps: int = 4) -> Figure:
    """Measures of one function, written with other weights."""
    model = network()
    train(model, 3, y)
    factors = [10 ** (k / steps) for k in range(-steps, steps + 1)]
    found = {name: [] for name in ("kappa", "Tr H", "lambda_max(H)", "SAM sharpness")}
    for factor, back in zip(factors, [1.0, *factors], strict=False):
        reparam.rescale_layer(model[2], model[3], model[4], factor=factor / back)
        table = measures(model, cross_entropy, (x[:300], y[:300]), max_products=20)
        for name, values in found.items():
            values.append(table[name].value)
    figure, ax = plt.subplots()
    looks = ((BLUE, "o", "-"), (ORANGE, "s", "-"), (PINK, "^", "--"), (GREEN, "D", "-"))
    for (name, values), (colour, marker, line) in zip(found.items(), looks, strict=True):
        middle = values[len(values) // 2]
        ax.plot(factors, [v / middle for v in values], color=colour, marker=marker, linestyle=line, label=name)
    ax.set(xscale="log", yscale="log", xlabel="c: weights of the output layer times c, its features divided by c")
    ax.set_ylabel("relative to c = 1")
    ax.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    ax.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    ax.legend()
    return figure


def confidence() -> Figure:
    """Kappa of the output layer in plain training, beside the confidence that it depends on."""
    model, flats = network(), []
    train(model, 40, y, after=lambda: flats.append(relative_flatness(model, cross_entropy, (x, y), layer="output")))
    figure, (above, below) = plt.subplots(2, sharex=True)
    above.plot([float(f) for f in flats], color=BLUE, marker="o", markersize=4)
    above.set_ylabel("kappa")
    below.plot([f.confidence for f in flats], color=ORANGE, marker="s", markersize=4)
    below.set(ylabel="confidence", xlabel="epoch of plain training", ylim=(0, 1.05))
    return figure


def penalty(sizes: tuple[float, ...] = (1e-3, 4e-3, 0.016, 0.064, 0.256), seeds: int = 2) -> Figure:
    """What the penalty comes to, and training loss, over its size, a fifth of the labels being wrong."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2))
    forms = {"bounded, every 8th step": {}, "unbounded, every step": {"bound": None, "every": 1}}
    for (name, form), colour, marker in zip(forms.items(), (BLUE, ORANGE), "os", strict=True):
        found = torch.tensor([[_with_penalty(seed, size=s, **form) for s in sizes] for seed in range(seeds)])
        for ax, values in zip(axes, found.unbind(-1), strict=True):
            ax.plot(sizes, values.mean(0), color=colour, marker=marker, label=name)
            ax.fill_between(sizes, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)
    axes[0].axhline(0.3, color=GREY, linestyle="--", label="bound")
    axes[1].axhline(_with_penalty(0, size=0.0)[1], color=GREY, linestyle=":", label="plain")
    for ax, what in zip(axes, ("penalty of a step / its loss", "training loss"), strict=True):
        ax.set(xscale="log", xlabel="size", ylabel=what)
        ax.set_xticks([1e-3, 1e-2, 1e-1], ["0.001", "0.01", "0.1"])
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    named = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), ncols=4, loc="outside upper left")
    return figure


def _with_penalty(seed: int, **options: object) -> tuple[float, float]:
    """The penalty's mean share of the loss after a training on labels partly wrong, and the training loss."""
    targets, model, shares = noisy(seed), network(seed), []
    with FAM(cross_entropy, model, **options) as criterion:
        train(model, 15, targets, criterion)
        model.train()
        for rows in torch.arange(len(x)).split(50):
            criterion(model(x[rows]), targets[rows])
            shares.append(criterion.last["penalty"] / criterion.last["task"])
        penalised = [share for share in shares if share > 0]
    model.eval()
    with torch.no_grad():
        return sum(penalised) / max(1, len(penalised)), float(cross_entropy(model(x), targets))


FIGURES = {f.__name__: f for f in (kappa, invariance, confidence, penalty)}


def main() -> None:
    """Draw the figures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; by default all")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    plt.rcParams.update(STYLE | {"figure.figsize": (6.4, 3.4), "figure.constrained_layout.use": True})
    plt.rcParams["svg.hashsalt"] = "relflat"  # the same file each time
    for name in given.names or FIGURES:
        FIGURES[name]().savefig(given.to / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
