"""Measuring the relative flatness of a trained run, on its own data."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from relflat import Flatness, relative_flatness_by_layer
from relflat.errors import ConfigError
from relflat.lab.common.names import names_in, unknown
from relflat.lab.data.batches import in_order
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.train import checkpoint
from relflat.lab.train.loop import SPLITS
from relflat.lab.train.session import joined
from relflat.lab.train.store import config_of


def measure_run(
    run: Path,
    *,
    layer: str | None = None,
    split: str = "train",
    samples: int | None = None,
    task: str | None = None,
    watched: Callable[[list[Any]], Iterable[Any]] = list,
    **options: Any,
) -> dict[str, Flatness]:
    """Rebuild a run's data and network from its folder and measure some of its layers, by their qualified names.

    The first so many samples of the split are taken, with the labels the run saw. ``layer`` may be a glob or several
    names with commas, by default the layer the task follows; ``task`` trusts the task file of a run from elsewhere
    (`config_of`); ``watched`` is put around the batches; further options are those of
    `relflat.relative_flatness_by_layer`. Under ``torchrun`` each process measures its share, all get the same result.

    Raises:
        DataError: the folder holds no run, no checkpoint, or the data set was not fetched.
        ConfigError: no such split, or fewer samples than 1.
        LayerError: no such layer.
    """
    config = config_of(run, task)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if samples is not None and samples < 1:
        raise ConfigError(f"samples={samples} must be above 0; leave it out to measure on all of them.")
    learned = task_named(config.task)
    model = learned.model()
    checkpoint.load_weights(run, model)
    splits = learned.splits(train_size=config.train_size, label_noise=config.label_noise, seed=config.seed)
    data = (splits.test() if split == "test" else getattr(splits, split)).take(slice(samples))
    with joined() as process:
        ranks, device = process.num_processes, process.device
        share = slice(*(len(data) * (process.process_index + i) // ranks for i in (0, 1)))
        return relative_flatness_by_layer(
            model.to(device),
            learned.loss(),
            watched(list(in_order(data.take(share), device))),
            layer=names_in(layer or learned.layer),
            device=device,
            process_group=dist.group.WORLD if ranks > 1 else None,
            **options,
        )
