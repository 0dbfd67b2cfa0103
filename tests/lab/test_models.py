import pytest
import torch
from torch import nn

from relflat.lab.tasks.models import mlp, resnet18, resnet20, small_cnn


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (mlp(64), (2, 1, 8, 8)),
        (small_cnn(), (2, 1, 28, 28)),
        (small_cnn(in_channels=3), (2, 3, 32, 32)),
        (resnet18(width=8), (2, 3, 32, 32)),
        (resnet20(), (2, 3, 32, 32)),
        (resnet18(width=8, in_channels=1, feature_width=64), (2, 1, 28, 28)),
    ],
)
def test_models_end_in_a_linear_layer_called_output(model, shape):
    outputs = []
    model.get_submodule("output").register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(torch.randn(shape))
    assert logits.shape == (2, 10)
    assert isinstance(model.get_submodule("output"), nn.Linear)
    assert outputs[0] is logits


def test_resnet18_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in resnet18().parameters()) == 11_173_962
    assert resnet18(feature_width=64).output.in_features == 64


def test_resnet20_has_the_published_size():
    """0.27 million parameters, 20 weight layers besides the two projections."""
    model = resnet20()
    assert sum(parameter.numel() for parameter in model.parameters()) == 272_474
    weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == 20 + 2


def test_resnet18_reduces_32_pixels_to_4():
    model = resnet18(width=8)
    assert model.blocks(model.stem(torch.randn(1, 3, 32, 32))).shape == (1, 64, 4, 4)
