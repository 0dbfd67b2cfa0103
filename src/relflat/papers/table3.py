"""Table 3 of the FAM paper: fine-tuning a language model on RTE, plain and with a flat output layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from relflat.lab.compare.search import Candidate, choose, judge
from relflat.lab.compare.statistics import Difference, differences, mean_sd
from relflat.lab.compare.trials import Trial
from relflat.lab.data import fetch
from relflat.lab.report.formats import finite, interval, number
from relflat.lab.train.config import RunConfig
from relflat.papers import sentences, training_study
from relflat.papers.experiment import Context, Outcome, Scale, Table
from relflat.papers.painting import by_arm
from relflat.papers.sheets import Sheet
from relflat.papers.training_study import finished, numbers, train_all

SHEET = Sheet("table3")
PRINTED_STRENGTH: float = SHEET["strength"]
PAPER: Mapping[str, tuple[float, float, float]] = SHEET["printed"]
ARMS: Mapping[str, Mapping[str, str]] = SHEET["arms"]
SEARCH_SEED = 100
METRIC = "accuracy"
Runs = Mapping[str, Sequence[Trial]]


@dataclass(frozen=True)
class Size(training_study.Size):
    """What is run at one scale."""

    strengths: tuple[float, ...]  # from which FAM's is chosen on validation data; none: the paper's is used
    printed_seeds: tuple[int, ...]  # of the tested runs at the paper's strength, where another is chosen


SIZES = SHEET.sizes(Size)


def config(size: Size, arm: str, strength: float, seed: int) -> RunConfig:
    """One run; plain training has no strength."""
    if arm == "plain":
        return size.config(seed, algorithm="plain")
    return size.config(seed, algorithm="fam", bound=None, strength=strength, gradient=ARMS[arm]["gradient"])


def run(context: Context) -> Outcome:
    """Fine-tune with and without FAM over the seeds."""
    size = SIZES[context.scale]
    if context.scale == "paper":
        sentences.require_bert()
        fetch.require("rte", "minilm")  # MiniLM has BERT's word pieces
    tried = [(strength, config(size, "fam", strength, SEARCH_SEED)) for strength in size.strengths]
    searched = train_all(context, tried, test=False, what="trainings of the search")
    candidates = [judge("fam", {"strength": each}, trials, METRIC) for each, trials in searched.items()]
    strength = choose(candidates, "fam").settings["strength"] if candidates else PRINTED_STRENGTH
    places = [(arm, config(size, arm, strength, seed)) for seed in size.seeds for arm in ("plain", "fam")]
    others = ("fam-printed", "fam-code") if size.strengths else ("fam-code",)
    places += [(arm, config(size, arm, PRINTED_STRENGTH, seed)) for seed in size.printed_seeds for arm in others]
    return conclude(context.scale, candidates, strength, train_all(context, places))


def difference(runs: Runs) -> Difference | None:
    """FAM against plain training over the seeds on which both finished."""
    both = [pair for pair in zip(runs["plain"], runs["fam"], strict=True) if all(each.finished for each in pair)]
    if len(both) < 2:
        return None
    plain, fam = (numbers(trials, "test", METRIC) for trials in zip(*both, strict=True))
    return differences({"plain": plain, "FAM": fam})[0]


def conclude(scale: Scale, candidates: Sequence[Candidate], strength: float, runs: Runs) -> Outcome:
    """What the runs show."""
    size, pair = SIZES[scale], difference(runs)
    groups = {ARMS[arm]["short"]: numbers(trials, "test", METRIC) for arm, trials in runs.items()}
    rows = [cells(arm, strength, trials) for arm, trials in runs.items()]
    config = asdict(runs["plain"][0].config)
    at_the_end = strength in size.strengths[:1] + size.strengths[-1:]
    return Outcome(
        findings=[*findings(strength, runs, pair), *([SHEET.say("edge", strength=strength)] if at_the_end else [])],
        tables=[SHEET.table("scores", rows), *([searched(candidates)] if candidates else [])],
        figures=[SHEET.figure("scores", partial(by_arm, groups, "test accuracy"))],
        scaled=SHEET.differs(scale, **config, tokens=sentences.SHORT),
        data={
            "strength": strength,
            "search": [{**each.settings, "validation": each.score, "loss": each.loss} for each in candidates],
            "runs": {arm: [trial.tested for trial in trials] for arm, trials in runs.items()},
            "paper": {arm: dict(zip(("mean", "sd", "max"), row, strict=True)) for arm, row in PAPER.items()},
            "difference": None if pair is None else asdict(pair),
        },
    )


def findings(strength: float, runs: Runs, pair: Difference | None) -> list[str]:
    """In words: mean, spread and best seed as the paper has them, and what the printed strength does."""
    found = [SHEET.say("none")] if pair is None else compared(pair, runs)
    at_printed = ("fam-printed", "fam-code") if strength != PRINTED_STRENGTH else ("fam", "fam-code")
    return [*found, SHEET.say("code"), *(printed(arm, runs[arm]) for arm in at_printed if runs.get(arm))]


def compared(pair: Difference, runs: Runs) -> list[str]:
    """Mean and deviation of FAM against plain training beside the paper's."""
    plain, fam = (mean_sd(numbers(runs[arm], "test", METRIC))[1] for arm in ("plain", "fam"))
    (mean, sd, _), (fam_mean, fam_sd, _) = PAPER["plain"], PAPER["fam"]
    verdict = "reproduced" if pair.shown and pair.mean > 0 else "not reproduced"
    values = {**asdict(pair), "points": 100 * pair.mean, "interval": interval(pair), "verdict": verdict}
    word = "smaller" if fam < plain else "not smaller"
    return [
        SHEET.say("gain", **values, printed=100 * (fam_mean - mean)),
        SHEET.say("deviation", word=word, fam=fam, plain=plain, printed_fam=fam_sd, printed_plain=sd),
    ]


def printed(arm: str, trials: Sequence[Trial]) -> str:
    """What the paper's strength does to accuracy and to the layer."""
    gradient = SHEET.say(ARMS[arm]["gradient"])
    if not finished(trials):
        return SHEET.say("diverges", gradient=gradient)
    parts = {"accuracy": ("test", METRIC), "kappa": ("flatness", "value"), "confidence": ("flatness", "confidence")}
    means = {name: mean_sd(numbers(trials, *place))[0] for name, place in parts.items()}
    said = SHEET.say("printed", gradient=gradient, **means)
    return SHEET.say("same" if means["confidence"] < 0.51 else "little", line=said)


def cells(arm: str, strength: float, trials: Sequence[Trial]) -> tuple[str, ...]:
    """Mean, deviation and best seed, as the paper has them."""
    own, paper = numbers(trials, "test", METRIC), PAPER.get(arm)
    return (
        ARMS[arm]["title"].format(strength=strength),
        *(["", "", ""] if paper is None else [f"{value:.4f}" for value in paper]),
        *(finite(value, ".4f") for value in mean_sd(own)),
        f"{max(own):.4f}" if own else "",
        f"{len(own)} of {len(trials)}",
        *(number(mean_sd(numbers(trials, "flatness", key))) for key in ("value", "confidence", "weight_norm")),
    )


def searched(candidates: Sequence[Candidate]) -> Table:
    """How the strength was chosen."""
    best = choose(candidates, "fam")
    rows = []
    for each in candidates:
        strength = f"{each.settings['strength']:g}" + (" ← chosen" if each is best else "")
        rows.append((strength, "diverged" if each.diverged else f"{each.score:.4f}", f"{each.loss:.4f}"))
    return SHEET.table("search", rows, seed=SEARCH_SEED)
