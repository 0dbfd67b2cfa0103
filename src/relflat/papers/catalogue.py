"""The experiments by name, as ``relflat reproduce NAME`` has them.

An experiment is a module with a function ``run`` and a file of the same name in ``sheets``.
"""

from functools import partial
from importlib import import_module

from relflat.papers.experiment import Context, Experiment, Outcome
from relflat.papers.sheets import Sheet

NAMES = ("table1", "table2", "table3", "cost", "correlation", "invariance", "layers", "grokking")


def run(name: str, context: Context) -> Outcome:
    """Import the experiment of this name and carry it out."""
    return import_module(f"{__package__}.{name}").run(context)


SHEETS = {name: Sheet(name) for name in NAMES}
EXPERIMENTS = {
    name: Experiment(name, sheet["summary"], sheet["paper"], partial(run, name)) for name, sheet in SHEETS.items()
}
