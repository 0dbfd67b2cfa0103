"""Table 3 of the FAM paper: fine-tuning a language model on RTE, plain and with a flat output layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from relflat.lab.compare.search import Candidate, choose, judge
from relflat.lab.compare.statistics import Difference, differences, mean_sd
from relflat.lab.compare.trials import Job, Trial, run_all, workers
from relflat.lab.data import fetch
from relflat.lab.report.drawing import COLOURS, MARKERS
from relflat.lab.report.formats import finite, interval, number
from relflat.lab.report.summary import spread
from relflat.lab.train.config import RunConfig, make
from relflat.papers import sentences
from relflat.papers.experiment import Context, Experiment, Figure, Outcome, Scale, Table

PRINTED_STRENGTH = 3e6
PAPER = {"plain": (0.6736, 0.018, 0.6931), "fam": (0.6982, 0.0154, 0.7184)}  # mean, deviation, highest
SEARCH_SEED = 100
METRIC = "accuracy"


@dataclass(frozen=True)
class Size:
    """What is run at one scale.

    Attributes:
        task: name in the file of the experiment's tasks.
        common: values that all runs share.
        strengths: from which FAM's is chosen on validation data; none: the paper's is used.
        seeds: of the tested runs of plain training and FAM.
        printed_seeds: of the tested runs at the paper's strength, where another is chosen.
    """

    task: str
    common: Mapping[str, Any]
    strengths: tuple[float, ...]
    seeds: tuple[int, ...]
    printed_seeds: tuple[int, ...]


SIZES: dict[Scale, Size] = {
    "small": Size(
        "few", {"train_size": 192, "epochs": 2, "lr": 1e-4}, (0.001, 0.01, 0.1), tuple(range(5)), (0, 1)
    ),
    "paper": Size("rte_bert", {}, (), tuple(range(5)), tuple(range(5))),
}

TITLES = {
    "plain": "plain",
    "fam": "FAM",
    "fam-printed": "FAM, strength 3e6",
    "fam-code": "FAM, strength 3e6, gradient of the layer only",
}
GRADIENT = {"fam": "full", "fam-printed": "full", "fam-code": "weights"}


def task_name(size: Size) -> str:
    """The task by its file, as ``relflat train`` takes it."""
    return f"{Path(sentences.__file__).resolve()}:{size.task}"


def config(size: Size, arm: str, strength: float, seed: int) -> RunConfig:
    """One run.

    Args:
        size: task and budget.
        arm: its name.
        strength: FAM's; plain training has none.
        seed: of the run.
    """
    algorithm: dict[str, Any] = {"algorithm": "plain"}
    if arm in GRADIENT:
        algorithm = {"algorithm": "fam", "strength": strength, "gradient": GRADIENT[arm]}
    return make({"task": task_name(size), **size.common, **algorithm, "seed": seed})


def run(context: Context) -> Outcome:
    """Fine-tune with and without FAM over the seeds.

    Raises:
        DataError: the sentences or the pretrained encoder are not there; how to get them is said.
    """
    size = SIZES[context.scale]
    if context.scale == "paper":
        sentences.require_bert()
        fetch.require("rte", "minilm")  # MiniLM has BERT's word pieces
    tell = context.counter("trainings")
    with workers(context.workers) as pool:

        def do(configs: Sequence[RunConfig], test: bool) -> list[Trial]:
            return run_all(pool, [Job(each, context.runs, test) for each in configs], tell)

        candidates = search(size, do)
        strength = choose(candidates, "fam").settings["strength"] if candidates else PRINTED_STRENGTH
        runs = tested(size, strength, do)
    return conclude(size, candidates, strength, runs)


Do = Callable[[Sequence[RunConfig], bool], list[Trial]]
Runs = Mapping[str, Sequence[Trial]]


def search(size: Size, do: Do) -> list[Candidate]:
    """Try each strength once; the test split is not evaluated."""
    trials = do([config(size, "fam", strength, SEARCH_SEED) for strength in size.strengths], False)
    return [
        judge("fam", {"strength": strength}, [trial], METRIC)
        for strength, trial in zip(size.strengths, trials, strict=True)
    ]


def tested(size: Size, strength: float, do: Do) -> dict[str, list[Trial]]:
    """All tested runs by name of the arm; done seed by seed, so that an interrupted table has whole seeds."""
    pairs = [(arm, seed) for seed in size.seeds for arm in ("plain", "fam")]
    others = ("fam-printed", "fam-code") if size.strengths else ("fam-code",)
    pairs += [(arm, seed) for seed in size.printed_seeds for arm in others]
    strengths = {"fam": strength, "fam-printed": PRINTED_STRENGTH, "fam-code": PRINTED_STRENGTH}
    trials = do([config(size, arm, strengths.get(arm, 0.0), seed) for arm, seed in pairs], True)
    found: dict[str, list[Trial]] = {}
    for (arm, _), trial in zip(pairs, trials, strict=True):
        found.setdefault(arm, []).append(trial)
    return found


def scores(trials: Sequence[Trial]) -> list[float]:
    """Test accuracies of the runs that finished."""
    return [trial.result["test"][METRIC] for trial in trials if trial.finished]


def difference(runs: Runs) -> Difference | None:
    """FAM against plain training over the seeds on which both finished."""
    pairs = [
        (a.result["test"][METRIC], b.result["test"][METRIC])
        for a, b in zip(runs["plain"], runs["fam"], strict=True)
        if a.finished and b.finished
    ]
    if len(pairs) < 2:
        return None
    return differences({"plain": [a for a, _ in pairs], "FAM": [b for _, b in pairs]})[0]


def conclude(size: Size, candidates: Sequence[Candidate], strength: float, runs: Runs) -> Outcome:
    """What the runs show."""
    return Outcome(
        findings=[*findings(strength, runs), *edge(size, strength)],
        tables=[table(strength, runs), *([chosen(candidates)] if candidates else [])],
        figures=[
            Figure(
                "Test accuracy by seed",
                partial(dots, runs),
                "Left to right: seeds 0, 1, ... of each arm, the bar is their mean.",
            )
        ],
        scaled=scaled(size, runs),
        data={
            "strength": strength,
            "search": [
                {"strength": each.settings["strength"], "validation": each.score, "loss": each.loss}
                for each in candidates
            ],
            "runs": {arm: [trial.tested for trial in trials] for arm, trials in runs.items()},
            "paper": {arm: dict(zip(("mean", "sd", "max"), row, strict=True)) for arm, row in PAPER.items()},
            "difference": None if (pair := difference(runs)) is None else asdict(pair),
        },
    )


def findings(strength: float, runs: Runs) -> list[str]:
    """In words: mean, spread and best seed as the paper has them, and what the printed strength does."""
    found = []
    pair = difference(runs)
    gain = 100 * (PAPER["fam"][0] - PAPER["plain"][0])
    if pair is None:
        found.append("Nothing can be compared: fewer than two seeds finished on both arms.")
    else:
        low = f"p = {pair.p:.2g} over {pair.n} seeds, and no p of so few can be below {pair.least_p:.2g}"
        found.append(
            f"Mean accuracy of FAM against plain training: {100 * pair.mean:+.1f} points, where the paper has "
            f"{gain:+.1f}; interval {interval(pair)}, {low}. "
            + ("The gain is reproduced." if pair.shown and pair.mean > 0 else "The gain is not reproduced.")
        )
        (_, plain), (_, fam) = mean_sd(scores(runs["plain"])), mean_sd(scores(runs["fam"]))
        word = "smaller" if fam < plain else "not smaller"
        found.append(
            f"The deviation over seeds is {word} with FAM: {fam:.4f} against {plain:.4f}; the paper has "
            f"{PAPER['fam'][1]:.4f} against {PAPER['plain'][1]:.4f}."
        )
    found.append(
        "The released code divides kappa by the number of features and sums other entries of the Hessian, so its "
        "strengths are not those of its text."
    )
    for arm in ("fam-printed", "fam-code") if strength != PRINTED_STRENGTH else ("fam", "fam-code"):
        found += [printed(arm, runs[arm])] if runs.get(arm) else []
    return found


def edge(size: Size, strength: float) -> list[str]:
    """A warning where the best strength lies at the end of the grid."""
    if strength not in (size.strengths[:1] + size.strengths[-1:]):
        return []
    return [f"The chosen strength, {strength:g}, lies at the end of the grid: a wider one might do better."]


def printed(arm: str, trials: Sequence[Trial]) -> str:
    """What the paper's strength does to accuracy and to the layer."""
    done = [trial.result for trial in trials if trial.finished]
    part = "all of Lemma 1" if GRADIENT[arm] == "full" else "the layer's weight only, as in the released code"
    if not done:
        return f"At the paper's strength 3e6, gradient of {part}: training diverges."
    accuracy = mean_sd(scores(trials))[0]
    confidence, kappa = (
        mean_sd([result["flatness"][key] for result in done])[0] for key in ("confidence", "value")
    )
    line = (
        f"At the paper's strength 3e6, gradient of {part}: accuracy {accuracy:.3f}, kappa {kappa:.3g}, confidence "
        f"{confidence:.3f}"
    )
    if confidence < 0.51:
        return f"{line}; the network says about the same of every sentence."
    return f"{line}; AdamW's steps do not grow with the gradient, so a large strength moves one layer little."


def table(strength: float, runs: Runs) -> Table:
    """Mean, deviation and best seed, as the paper has them."""
    rows = []
    for arm, trials in runs.items():
        own, paper = scores(trials), PAPER.get(arm)
        done = [trial.result for trial in trials if trial.finished]
        mean, sd = spread(own)

        def of_layer(key: str, done: Sequence[Mapping[str, Any]] = done) -> str:
            return number(spread([result["flatness"][key] for result in done]))

        rows.append(
            (
                TITLES[arm] if arm != "fam" else f"FAM, strength {strength:g}",
                *(["", "", ""] if paper is None else [f"{value:.4f}" for value in paper]),
                finite(mean, ".4f"),
                finite(sd, ".4f"),
                f"{max(own):.4f}" if own else "",
                f"{len(own)} of {len(trials)}",
                of_layer("value"),
                of_layer("confidence"),
                of_layer("weight_norm"),
            )
        )
    paper_columns = ("mean, paper", "sd, paper", "max, paper")
    return Table(
        "Test accuracy",
        ("arm", *paper_columns, "mean", "sd", "max", "n", "kappa", "confidence", "||W||"),
        tuple(rows),
        "Over seeds 0, 1, ...; kappa, confidence and ||W|| of the output layer on the training data, mean ± sd.",
    )


def chosen(candidates: Sequence[Candidate]) -> Table:
    """How the strength was chosen."""
    best = choose(candidates, "fam")
    return Table(
        "How FAM's strength was chosen",
        ("strength", "validation accuracy", "validation loss"),
        tuple(
            (
                f"{each.settings['strength']:g}" + (" ← chosen" if each is best else ""),
                f"{each.score:.4f}" if not each.diverged else "diverged",
                f"{each.loss:.4f}",
            )
            for each in candidates
        ),
        f"One run each, seed {SEARCH_SEED}, not tested; of equal accuracies the lower loss decides.",
    )


def dots(runs: Runs, axes: Axes) -> None:
    """Paint each seed's accuracy by arm, with the mean."""
    for place, trials in enumerate(runs.values()):
        own = scores(trials)
        if not own:
            continue
        look: dict[str, Any] = {"color": COLOURS[place]}
        across = [place + 0.12 * (seed - (len(own) - 1) / 2) for seed in range(len(own))]
        axes.plot(across, own, marker=MARKERS[place], linestyle="", markersize=5, **look)
        axes.hlines(mean_sd(own)[0], place - 0.35, place + 0.35, linewidth=1.5, **look)
    names = {"plain": "plain", "fam": "FAM", "fam-printed": "FAM 3e6", "fam-code": "FAM 3e6,\nlayer only"}
    axes.set_xticks(range(len(runs)), [names[arm] for arm in runs])
    axes.set_ylabel("test accuracy")


def scaled(size: Size, runs: Runs) -> list[str]:
    """What differs from the paper."""
    if not size.strengths:
        return [
            "40 sentences of the training set are held out; nothing is chosen on them.",
            "The whole gradient of the paper's Lemma 1, and beside it that of the released code, which reaches the "
            "output weight only.",
        ]
    config = runs["plain"][0].config
    return [
        f"Which film sentences are positive (at most {sentences.SHORT} tokens, {config.train_size} to train on, "
        "400 to test) in place of RTE, which only the hub has.",
        "MiniLM, 6 layers of width 384 and pretrained for sentence similarity, in place of BERT-base.",
        f"{config.epochs} epochs at learning rate {config.lr:g} in place of 20 at 2e-5; batches of "
        f"{config.batch_size}, as the paper.",
        "FAM's strength is chosen on 200 validation sentences with one seed; the paper reports its numbers on the "
        "development set, on which its strength may have been chosen.",
    ]


EXPERIMENT = Experiment(
    name="table3",
    summary="fine-tuning a language model, plain and with FAM, over five seeds",
    paper="FAM paper, Table 3, RTE with BERT-base, accuracy over 5 seeds, plain -> FAM: mean .6736 -> .6982, "
    "standard deviation .018 -> .0154, highest .6931 -> .7184; AdamW 2e-5, 20 epochs, batch 32, length 128, "
    "strength 3e6.",
    run=run,
)
