"""Normalisation in training and in evaluation, and dropout."""

from architectures import CLASSES, IN, Family, Net, image
from checks import EachArchitecture
from torch import nn

architecture = Family()


@architecture("fc")
def batch_norm_after_the_layer_in_training() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.fc(x)).tanh()),
        fc=nn.Linear(IN, 2),
        norm=nn.BatchNorm1d(2),
        head=nn.Linear(2, CLASSES),
    )


class FrozenBatchNorm(nn.BatchNorm1d):
    """Stays in evaluation mode, as for fine-tuning."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


@architecture("fc")
def batch_norm_after_the_layer_in_evaluation() -> nn.Module:
    norm = FrozenBatchNorm(3)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    return Net(
        lambda m, x: m.head(m.norm(m.fc(x)).tanh()), fc=nn.Linear(IN, 3), norm=norm, head=nn.Linear(3, CLASSES)
    )


@architecture("conv", x=image(1, 3, 3))
def convolution_and_batch_norm_in_training() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.conv(x)).tanh().mean((2, 3))),
        conv=nn.Conv2d(1, 2, 3, padding=1, stride=2, bias=False),
        norm=nn.BatchNorm2d(2),
        head=nn.Linear(2, CLASSES),
    )


@architecture("conv", x=image(2, 3))
def group_norm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.conv(x)).tanh().flatten(1)),
        conv=nn.Conv1d(2, 4, 2),
        norm=nn.GroupNorm(2, 4),
        head=nn.Linear(8, CLASSES),
    )


@architecture("fc")
def layer_norm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.fc(x)).tanh()),
        fc=nn.Linear(IN, 3),
        norm=nn.LayerNorm(3),
        head=nn.Linear(3, CLASSES),
    )


@architecture("conv", x=image(1, 4))
def instance_norm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.conv(x)).tanh().flatten(1)),
        conv=nn.Conv1d(1, 2, 2),
        norm=nn.InstanceNorm1d(2, affine=True),
        head=nn.Linear(6, CLASSES),
    )


@architecture("fc", "head")
def dropout_before_and_after() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.drop(m.fc(m.drop(x)).tanh())),
        fc=nn.Linear(IN, 6),
        drop=nn.Dropout(0.4),
        head=nn.Linear(6, CLASSES),
    )


class TestNormalisation(EachArchitecture):
    family = architecture
