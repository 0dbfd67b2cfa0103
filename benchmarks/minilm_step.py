"""A fine-tuning step of MiniLM on film reviews: FAMTrainer on the output layer against the plain Trainer.

    python benchmarks/minilm_step.py            the committed result
    python benchmarks/minilm_step.py --steps 10 --batch 16

The pretrained encoder and the sentences are those of the lab's task ``reviews``. Both trainers do
whole training steps (``training_step``, optimiser) on the same batches, in turns (``paired.py``).
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import tyro
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from output import RESULTS, environment, save, show
from paired import Ratio, compare
from relflat.integrations.transformers import FAMTrainer
from relflat.lab.data import reviews
from relflat.lab.data.fetch import files, get
from relflat.lab.tasks.text import encode

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


def batches(options: Options) -> list[dict[str, torch.Tensor]]:
    """Real batches, all of the same shape."""
    films = reviews.sentences(files("reviews"))["films"]
    order = torch.randperm(len(films.texts), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for start in range(0, 32 * options.batch, options.batch):
        rows = order[start : start + options.batch]
        coded = encode([films.texts[i] for i in rows], tokens=options.tokens)
        found.append(coded | {"labels": torch.tensor([films.labels[i] for i in rows])})
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
    get("reviews", print)
    get("minilm", print)
    where, source = environment(), files("minilm")
    where["packages"] |= {"transformers": transformers.__version__}
    data = batches(options)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, report_to="none", learning_rate=1e-5, seed=0)

        def trainer(kind: type[Trainer], **extra: Any) -> Trainer:
            torch.manual_seed(0)
            return kind(AutoModelForSequenceClassification.from_pretrained(source, num_labels=2), args, **extra)

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
            (r["row"], str(Ratio(**r["wall"])), str(Ratio(**r["processor"])), f"{r['wall']['seconds']:.3f}")
            for r in rows
        ],
    )
    print(f"method {last['method']} on {fam.criterion.layers}, kappa {last['kappa']:.4g}, loss {last['task']:.4g}")
    settings = {k: v for k, v in asdict(options).items() if k != "json"}
    result = {"environment": where, "options": settings, "method": last["method"], "rows": rows}
    save(options.json, result)
    print(f"written: {options.json}")


if __name__ == "__main__":
    main()
