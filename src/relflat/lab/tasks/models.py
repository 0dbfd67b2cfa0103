"""The networks of the tasks. Each ends in a Linear layer: the output layer that is regularised."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


def mlp(inputs: int, hidden: tuple[int, ...] = (128, 128), num_classes: int = 10) -> nn.Sequential:
    """A ReLU network: ``fc1``, ``fc2``, ... and ``output``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (width, size) in enumerate(pairwise((inputs, *hidden)), 1):
        layers |= {f"fc{number}": nn.Linear(width, size), f"relu{number}": nn.ReLU()}
    layers["output"] = nn.Linear((inputs, *hidden)[-1], num_classes)
    return nn.Sequential(layers)


def small_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Three strided 3x3 convolutions (32, 64, 128) with BatchNorm, average pooling, Linear-64 and output."""
    layers = _strided(nn.Conv2d, nn.BatchNorm2d, (in_channels, 32, 64, 128), 3)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers |= {"fc": nn.Linear(128, 64), "output": nn.Linear(64, num_classes)}
    return nn.Sequential(layers)


def signal_cnn(num_classes: int = 10) -> nn.Sequential:
    """Three strided convolutions of width 5 (32, 64, 64) with BatchNorm, kept in place (no pooling), and output."""
    layers = _strided(nn.Conv1d, nn.BatchNorm1d, (1, 32, 64, 64), 5)
    layers |= {"flatten": nn.Flatten(), "output": nn.Linear(64 * 5, num_classes)}
    return nn.Sequential(layers)


def _strided(
    convolution: type[nn.Conv1d | nn.Conv2d], norm: type[nn.Module], channels: tuple[int, ...], kernel: int
) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, size) in enumerate(pairwise(channels), 1):
        layers[f"conv{number}"] = convolution(inputs, size, kernel, stride=2, padding=kernel // 2, bias=False)
        layers[f"bn{number}"] = norm(size)
        layers[f"relu{number}"] = nn.ReLU()
    return layers


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Apply the block."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class WideBlock(nn.Module):
    """BatchNorm, ReLU and convolution twice, dropout between, and a shortcut (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Apply the block; a shortcut that changes the shape starts from the activated input."""
        active = self.start(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


def stages(
    block: Callable[[int, int, int], nn.Module], inputs: int, width: int, count: int, blocks: int
) -> Iterator[list[nn.Module]]:
    """Stages of equally many residual blocks; each after the first halves the sides and doubles the channels.

    ``block`` builds one from its channels in and out and its stride; ``inputs`` channels come before the first stage.
    """
    for stage in range(count):
        outputs = width * 2**stage
        first = block(inputs, outputs, 2 if stage else 1)
        yield [first, *(block(outputs, outputs, 1) for _ in range(blocks - 1))]
        inputs = outputs


def wide_resnet(
    num_classes: int = 10,
    in_channels: int = 3,
    depth: int = 28,
    widen: int = 10,
    *,
    dropout: float = 0.3,
    feature_width: int = 64,
) -> nn.Sequential:
    """A wide ResNet with a Linear layer of ``feature_width`` before the output (WRN-28-10 + FC-64 in the FAM paper).

    ``depth`` is 6 k + 4 layers with weights, ``widen`` how many times 16, 32 and 64 channels the stages have.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    block = partial(WideBlock, dropout=dropout)
    for number, stage in enumerate(stages(block, 16, 16 * widen, 3, (depth - 4) // 6), 1):
        layers[f"stage{number}"] = nn.Sequential(*stage)
    width = 64 * widen
    layers["end"] = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers |= {"features": nn.Linear(width, feature_width), "output": nn.Linear(feature_width, num_classes)}
    return nn.Sequential(layers)


def resnet18(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, *, feature_width: int | None = None
) -> nn.Sequential:
    """A ResNet-18 for 28x28 or 32x32 pictures: a 3x3 stem without pooling, then four stages of two blocks.

    The first stage has ``width`` channels; ``feature_width`` (64 in the FAM paper) adds a Linear layer.
    """
    return _resnet(4, 2, width, num_classes, in_channels, feature_width)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """The ResNet-20 of He et al. (2016, section 4.2): three stages of three blocks, 16 to 64 channels.

    Its shortcuts across stages are 1x1 convolutions (their option B).
    """
    return _resnet(3, 3, 16, num_classes, in_channels, None)


def _resnet(
    count: int, blocks: int, width: int, num_classes: int, in_channels: int, feature_width: int | None
) -> nn.Sequential:
    stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
    body = stages(BasicBlock, width, width, count, blocks)
    layers["blocks"] = nn.Sequential(*(block for stage in body for block in stage))
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    wide = width * 2 ** (count - 1)
    if feature_width is not None:
        layers["features"] = nn.Linear(wide, feature_width)
    layers["output"] = nn.Linear(feature_width or wide, num_classes)
    return nn.Sequential(layers)
