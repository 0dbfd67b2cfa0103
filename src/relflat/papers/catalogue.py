"""The experiments by name, as ``relflat reproduce NAME`` has them.

An experiment is a module with a function ``run`` and a file of the same name in ``sheets``.
"""

from functools import partial
from importlib import import_module

from relflat.lab.common.names import look_up
from relflat.papers.experiment import Context, Experiment, Outcome
from relflat.papers.sheets import Sheet

NAMES = ("table1", "table2", "table3", "cost", "correlation", "invariance", "layers", "grokking")


def run(name: str, context: Context) -> Outcome:
    """Import the experiment of this name and carry it out."""
    outcome: Outcome = import_module(f"{__package__}.{name}").run(context)
    return outcome


def experiment(name: str) -> Experiment:
    """What the sheet of this name says, and how it is carried out."""
    sheet = Sheet(name)
    return Experiment(name, sheet["summary"], sheet["paper"], partial(run, name))


EXPERIMENTS = {name: experiment(name) for name in NAMES}


def experiment_named(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    return look_up("experiment", name, EXPERIMENTS)
