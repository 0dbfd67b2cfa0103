"""Pictures made worse in four ways, to test a trained network on: how much of its accuracy is left.

Each way has two severities and depends on the pictures alone, so that all networks see the same ones. The kinds are
among those of Hendrycks and Dietterich (2019, https://arxiv.org/abs/1903.12261), the severities are not.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from relflat.lab.data.arrays import Inputs
from relflat.lab.data.augment import Pictures

Corrupt = Callable[[Pictures, float], Pictures]


def noise(pictures: Pictures, share: float) -> Pictures:
    """Gaussian noise, its deviation a share of that of the pictures' pixels, channel by channel."""
    drawn = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return pictures + share * pictures.std((0, 2, 3), keepdim=True) * drawn


def blur(pictures: Pictures, share: float) -> Pictures:
    """A Gaussian blur whose deviation is a share of the side, taken as 25 pixels at least."""
    deviation = share * max(pictures.shape[-1], 25)
    reach = min(int(3 * deviation) + 1, min(pictures.shape[-2:]) - 1)
    return torch.from_numpy(gaussian_filter(pictures.numpy(), deviation, mode="mirror", radius=reach, axes=(2, 3)))


def contrast(pictures: Pictures, share: float) -> Pictures:
    """So much of the contrast is left: each picture moves towards its own mean, channel by channel."""
    mean = pictures.mean((2, 3), keepdim=True)
    return mean + share * (pictures - mean)


def moved(pictures: Pictures, share: float) -> Pictures:
    """Moved to the right and down by a share of the side, a pixel at least; the border's pixels come in."""
    height, width = pictures.shape[-2:]
    step = max(1, round(share * width))
    return functional.pad(pictures, (step, 0, step, 0), mode="replicate")[:, :, :height, :width]


CORRUPTIONS: Mapping[str, tuple[Corrupt, tuple[float, float]]] = {
    "noise": (noise, (0.3, 0.6)),
    "blur": (blur, (0.025, 0.05)),
    "contrast": (contrast, (0.5, 0.25)),
    "shift": (moved, (0.07, 0.19)),
}


def corruptions(pictures: Inputs) -> Iterator[tuple[str, Pictures]]:
    """The pictures changed in each way, by its name, at its milder and its stronger severity."""
    assert isinstance(pictures, Tensor)
    for name, (corrupt, severities) in CORRUPTIONS.items():
        yield from ((name, corrupt(pictures, severity)) for severity in severities)
