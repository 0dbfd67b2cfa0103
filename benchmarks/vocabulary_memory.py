"""Peak memory of cross-entropy + kappa against the number of classes, beside plain logits and cross-entropy.

    python benchmarks/vocabulary_memory.py --json build/vocabulary_memory.json

Forward and backward, each in a fresh process that measures its peak of resident memory above that with the inputs in
place: gradients of features and weight are counted, those themselves are not. A picture is drawn beside the JSON; the
committed one is docs/assets/vocabulary-memory.svg. The largest size needs 13 GiB; all of it some minutes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from linear_cross_entropy import PLAIN, elsewhere
from output import RESULTS, environment, save, show
from relflat.plot.style import COLOURS, MARKERS, STYLE

CONTESTANTS = (PLAIN, "full", "frozen")


@dataclass(frozen=True)
class Options:
    """Memory of linear_cross_entropy_fam against the number of classes.

    Attributes:
        tokens: rows of the features.
        features: columns of them.
        classes: sizes of the vocabulary.
        rounds: how often each contestant runs; the least peak counts.
        json: where to write the numbers, and the picture with another ending.
    """

    tokens: int = 8192
    features: int = 256
    classes: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    rounds: int = 2
    json: Path = RESULTS / "vocabulary_memory.json"


def peaks(options: Options, classes: int) -> list[dict[str, Any]]:
    """A row for each contestant, with its GiB."""
    words = ["--tokens", str(options.tokens), "--features", str(options.features), "--classes", str(classes)]
    gib = {name: min(elsewhere(name, words)[2] for _ in range(options.rounds)) for name in CONTESTANTS}
    return [{"case": f"{classes} classes", "classes": classes, "row": name, "gib": gib[name]} for name in CONTESTANTS]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line a contestant."""
    import matplotlib.pyplot as plt  # only where a picture is drawn

    names = {PLAIN: "logits and cross-entropy", "full": "with kappa, full gradient", "frozen": "with kappa, frozen"}
    sizes = sorted({row["classes"] for row in rows})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.1), layout="constrained")
        for place, (name, label) in enumerate(names.items()):
            look = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4}
            axes.plot(sizes, [row["gib"] for row in rows if row["row"] == name], label=label, **look)
        axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="peak memory, GiB")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_yticks((0.3, 1, 3, 10), ("0.3", "1", "3", "10"))
        axes.minorticks_off()
        axes.legend(fontsize="small")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Measure, print, write, draw."""
    options, where = tyro.cli(Options), environment()
    rows: list[dict[str, Any]] = []
    for size in options.classes:
        rows += peaks(options, size)
    cells = [[f"{n:,}", *(f"{row['gib']:.2f}" for row in rows if row["classes"] == n)] for n in options.classes]
    show(f"{options.tokens} tokens, {options.features} features, GiB", ("classes", *CONTESTANTS), cells)
    kept = {key: value for key, value in asdict(options).items() if key != "json"}
    save(options.json, {"environment": where, "options": kept, "rows": rows})
    draw(rows, options.json.with_suffix(".svg"))
    print(f"written: {options.json}")


if __name__ == "__main__":
    main()
