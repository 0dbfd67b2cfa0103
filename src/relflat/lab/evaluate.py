"""What a task is judged by, by its documented path; it is in `relflat.lab.tasks.metrics`."""

from relflat.lab.tasks.metrics import ACCURACY, Metric

__all__ = ["ACCURACY", "Metric"]
