"""The networks of the tasks, by their documented path; they are in `relflat.lab.tasks.models`."""

from relflat.lab.tasks.models import mlp, resnet18, resnet20, signal_cnn, small_cnn, wide_resnet

__all__ = ["mlp", "resnet18", "resnet20", "signal_cnn", "small_cnn", "wide_resnet"]
