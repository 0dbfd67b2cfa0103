"""What the experiments with many networks share: each is trained and measured once, then held against its gap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from relflat.errors import DataError
from relflat.lab.compare.trials import each, workers
from relflat.lab.train import store
from relflat.papers.association import Association, associate, tau
from relflat.papers.experiment import Context, Outcome, Scale
from relflat.papers.sheets import Sheet
from relflat.papers.trained import Recipe, Source, grid, trained

Record = dict[str, Any]
Found = Mapping[str, Mapping[str, Association]]
Measure = Callable[[nn.Sequential, Recipe], Record]
SETTINGS = {"batch_size": "batch size", "lr": "learning rate", "weight_decay": "weight decay"}


def recipes_of(sheet: Sheet, scale: Scale) -> list[Recipe]:
    """The networks of a scale: the values of ``[networks.both]`` and of its own table."""
    values = {**sheet["networks"].get("both", {}), **sheet["networks"][scale]}
    return grid(**{**values, "source": Source(**values["source"]), "seeds": range(values["seeds"])})


def study(
    context: Context, name: str, networks: Sequence[Recipe], measure: Measure, *, suffix: str, key: str = ""
) -> list[Record]:
    """Train every network and measure it if it reached the level; what an earlier command kept is not done again.

    What was measured is kept in files with this suffix, and stands under the key in the network's record
    (`relflat.papers.trained.Trained`), or beside the rest of it where that is empty.
    """
    folder = context.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    work = partial(study_one, folder, measure, suffix, key)
    with workers(context.workers) as pool:
        return each(pool, work, networks, context.counter("networks", len(networks)))


def study_one(folder: Path, measure: Measure, suffix: str, key: str, recipe: Recipe) -> Record:
    """Train and measure one network, or read what was kept."""
    network, result = trained(recipe, folder)
    if not result["reached"]:
        return result
    path = folder / f"{recipe.digest}-{suffix}.json"
    if not path.is_file():
        store.write_json(path, measure(network, recipe))
    found = store.read_json(path)
    return {**result, **({key: found} if key else found)}


def reached(networks: Sequence[Recipe], records: Sequence[Record]) -> list[Record]:
    """The results of the networks that reached the level.

    Raises:
        DataError: fewer than three did.
    """
    done = [record for record in records if record["reached"]]
    if len(done) < 3:
        raise DataError(
            f"{len(done)} of {len(records)} networks reached a training loss of {networks[0].level:g}, too few to "
            "correlate anything. Raise most_epochs or lower the learning rates."
        )
    return done


def associations(done: Sequence[Record], views: Callable[[Record], Mapping[str, Mapping[str, float]]]) -> Found:
    """Every measure with the gap, by view and name; ``views`` gives a network's measures so."""
    gaps, measured = [record["gap"] for record in done], [views(record) for record in done]
    return {
        view: {name: associate([each[view][name] for each in measured], gaps) for name in names}
        for view, names in measured[0].items()
    }


def completed(
    shown: Outcome, networks: Sequence[Recipe], records: Sequence[Record], kappas: Sequence[float], found: Found
) -> Outcome:
    """What an experiment shows, and what is to be said of any such study: what the settings do, who is missing."""
    done = [record for record in records if record["reached"]]
    pairs = {view: {name: pair.numbers for name, pair in own.items()} for view, own in found.items()}
    said = [*shown.findings, by_setting(done, kappas), *named(networks, records)]
    return replace(shown, findings=said, data={"networks": list(records), "associations": pairs, **shown.data})


def by_setting(records: Sequence[Record], kappas: Sequence[float]) -> str:
    """A sentence on how the settings of networks go with their gaps and kappas by themselves."""

    def taus(values: Sequence[float]) -> str:
        found = []
        for key, title in SETTINGS.items():
            setting = np.array([float(record["recipe"][key]) for record in records])
            if setting.min() < setting.max():
                found.append(f"{title} {tau(setting, np.array(values), np.ones((1, len(values))))[0]:+.2f}")
        return ", ".join(found)

    return (
        f"The settings go with the gap by themselves (tau: {taus([record['gap'] for record in records])}) and with "
        f"kappa ({taus(kappas)}): what kappa and the gap have to do with each other is in part what the settings do "
        "to both."
    )


def named(recipes: Sequence[Recipe], results: Sequence[Record]) -> list[str]:
    """A sentence on the networks that did not reach the level, by name; none if all did."""
    lost = [
        f"{recipe.title} (diverged)"
        if result["train_loss"] is None
        else f"{recipe.title} ({result['train_loss']:.2f} after {result['epochs']} epochs)"
        for recipe, result in zip(recipes, results, strict=True)
        if not result["reached"]
    ]
    count = f"{len(lost)} of {len(recipes)} networks did not reach a training loss of {recipes[0].level:g}"
    return [f"{count} and are left out: {'; '.join(lost)}."] if lost else []
