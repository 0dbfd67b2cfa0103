"""Tasks: what is learned, by which network, with which optimiser and budget.

A task is one `Task` record: made of a table of ``tasks.toml``, or in any file, where it is named
``path/to/file.py:name`` (docs/study/own-task.md).
"""

from relflat.lab.tasks.catalogue import TASKS, register, task_named
from relflat.lab.tasks.metrics import ACCURACY, Metric
from relflat.lab.tasks.models import mlp
from relflat.lab.tasks.task import SGD, Adam, AdamW, SplitFunction, Task, constant, cosine, linear, staircase

__all__ = [
    "ACCURACY",
    "SGD",
    "TASKS",
    "Adam",
    "AdamW",
    "Metric",
    "SplitFunction",
    "Task",
    "constant",
    "cosine",
    "linear",
    "mlp",
    "register",
    "staircase",
    "task_named",
]
