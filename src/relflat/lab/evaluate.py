"""What a task is judged by, by its documented path; it is in `relflat.lab.train.evaluate`."""

from relflat.lab.train.evaluate import ACCURACY, Metric

__all__ = ["ACCURACY", "Metric"]
