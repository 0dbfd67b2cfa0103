"""EfficientNet-Lite0 with ImageNet weights under a new output layer, for fine-tuning on small pictures.

EfficientNet (Tan and Le 2019) without squeeze-and-excitation and with ReLU6, as Google released it for phones. It is
piecewise linear, so the generalised Gauss-Newton curvature of any of its layers is the Hessian. Convolutions pad as
TensorFlow does, where the weights come from: the odd pixel goes to the right and the bottom.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from relflat.lab.data.fetch import reading

WEIGHTS = "efficientnet-lite0-57934424.pth"
# repeats, kernel, stride of the first, expansion, output channels (Tan and Le 2019, table 1)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


class SameConv2d(nn.Conv2d):
    """A convolution with sides of ceil(input / stride), padded on the right and bottom by the odd pixel."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Convolve."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        top, left = (total // 2 for total in missing)
        bottom, right = missing[0] - top, missing[1] - left
        if top == bottom and left == right:
            return functional.conv2d(x, self.weight, None, self.stride, (top, left), 1, self.groups)
        padded = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(padded, self.weight, None, self.stride, 0, 1, self.groups)


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm with TensorFlow's epsilon and, where active, ReLU6."""
    linear = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(linear, nn.BatchNorm2d(outputs, eps=1e-3), *([nn.ReLU6()] if active else []))


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by itself, narrow by 1x1; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand: nn.Module = nn.Identity() if expansion == 1 else convolution(inputs, wide, 1)
        self.depthwise = convolution(wide, wide, kernel, stride, groups=wide)
        self.project = convolution(wide, outputs, 1, active=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Apply the block."""
        out = self.project(self.depthwise(self.expand(x)))
        return out + x if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """The network with random weights; pictures are resized to ``side`` pixels (bilinear) before anything else."""

    def __init__(self, num_classes: int = 1000, side: int | None = None, dropout: float = 0.2) -> None:
        super().__init__()
        self.side = side
        self.stem = convolution(3, STEM, 3, 2)
        self.blocks = nn.Sequential()
        inputs = STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for place in range(repeats):
                self.blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if place else stride, expansion))
                inputs = outputs
        self.head = convolution(inputs, HEAD, 1)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.output = nn.Linear(HEAD, num_classes)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return the logits of pictures with values from 0 to 1; they are scaled as for the pretraining."""
        if self.side is not None:
            x = functional.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        x = (x * 255 - 127) / 128
        return self.output(self.pool(self.head(self.blocks(self.stem(x)))))


def efficientnet_lite0(num_classes: int = 10, side: int | None = 64) -> EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet weights and a new output layer."""
    model = EfficientNetLite0(num_classes, side)
    with reading("efficientnet-lite0") as folder:
        load_pretrained(model, folder / WEIGHTS)
    return model


def load_pretrained(model: EfficientNetLite0, path: Path, *, output: bool = False) -> None:
    """Copy the packaged weights, with ``output`` also those of the 1000 ImageNet classes, into the network.

    They are in the order of its own, under other names.
    """
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    ours = model.state_dict()
    found = dict(zip(ours, packaged.values(), strict=True))
    kept = {} if output else {name: ours[name] for name in ("output.weight", "output.bias")}
    model.load_state_dict(found | kept)
