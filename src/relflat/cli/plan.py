"""The plan of a comparison as the command line gives it, with a recipe under all arms or without."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from relflat.cli.options import Budget
from relflat.errors import ConfigError
from relflat.lab.compare.arms import ARMS, Arm, arms_named
from relflat.lab.compare.search import Plan
from relflat.lab.tasks.catalogue import task_named
from relflat.lab.train.config import RECIPE

FIRST_SEARCH_SEED = 100


def plan_for(task: str, arms: Sequence[str], budget: Budget, **common: Any) -> Plan:
    """The plan of a comparison as the command line gives it; ``common`` holds the values that all runs share."""
    searched = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + budget.search_seeds)
    most = min((len(arm.values) for arm in arms_named(arms) if arm.values), default=0)
    for name, least, limit, what in (
        ("trials", 0, most, ", the settings in the arms' grids"),
        ("beyond", 0, 9, ""),
        ("first_seed", 0, FIRST_SEARCH_SEED - 1, ""),
        ("seeds", 1, FIRST_SEARCH_SEED - budget.first_seed, ""),
    ):
        if not least <= getattr(budget, name) <= limit:
            raise ConfigError(f"{name}={getattr(budget, name)} must lie between {least} and {limit}{what}.")
    if budget.search_seeds < 1:
        raise ConfigError(f"search_seeds={budget.search_seeds} must be above 0.")
    parts = offered(task, common) if budget.recipe else {}
    contenders, inside = apart(arms_named(arms), parts, common)
    plan = Plan(
        task,
        common,
        tuple(replace(arm, values=arm.values[: budget.trials]) for arm in contenders),
        tuple(searched),
        tuple(range(budget.first_seed, budget.first_seed + budget.seeds)),
        beyond=budget.beyond,
        also_untuned=budget.also_untuned,
        recipe=parts,
        recipe_seeds=tuple(searched) if parts else (),
        in_recipe=tuple(arm.name for arm in inside),
    )
    plan = plan if budget.trials else plan.usual
    for arm in plan.arms:  # a wrong value is found before anything runs
        plan.config(arm, arm.grid[0], 0)
    return plan


def offered(name: str, given: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """By part of a recipe, the values that a task can choose of, none first; those that are given need no choice."""
    task = task_named(name)
    parts: dict[str, Sequence[Any]] = {}
    if task.augment is None:
        splits = task.splits(train_size=given.get("train_size"), label_noise=0.0, seed=0)
        parts |= {"recipe_augment": ("task", "shift", "crop-flip")} if splits.train.pictures else {}
    if type(task.loss()) is nn.CrossEntropyLoss:
        parts["recipe_smoothing"] = (0.0, *ARMS["smoothing"].values)
    parts["recipe_dropout"] = (0.0, *ARMS["dropout"].values)
    return {key: values for key, values in parts.items() if key not in given}


def apart(arms: Sequence[Arm], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[list[Arm], list[Arm]]:
    """The arms that are left, and those that are part of the recipe themselves."""
    parts = {*chosen, *(key for key, value in given.items() if value != RECIPE.get(key, value))}
    inside = [arm for arm in arms if f"recipe_{arm.algorithm}" in parts]
    return [arm for arm in arms if arm not in inside], inside
