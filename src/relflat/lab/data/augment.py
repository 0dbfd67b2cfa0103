"""Random changes to training pictures; the draws follow from seed, epoch and place of the sample alone."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

DRAWS = 5  # uniform numbers a picture and epoch; each change says which it uses

Pictures = Float[Tensor, "n c h w"]
Draws = Float[Tensor, "n draws"]
Augment = Callable[[Pictures, Draws], Pictures]
Augmentation = Literal["task", "none", "shift", "crop-flip"]  # what a recipe may have in place of the task's


def draws_for(samples: int, seed: int, epoch: int) -> Draws:
    """Uniform numbers for all samples of an epoch, whatever the batches and however many processes."""
    generator = torch.Generator().manual_seed((1 << 60) + (seed << 20) + epoch)
    return torch.rand(samples, DRAWS, generator=generator)


def shift(pictures: Pictures, draws: Draws, pad: int = 4) -> Pictures:
    """Shift by up to ``pad`` pixels each way, zeros coming in; draws 0 and 1."""
    height, width = pictures.shape[-2:]
    padded = functional.pad(pictures, (pad, pad, pad, pad))
    down, right = (draws[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    sample = torch.arange(len(pictures))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def crop_flip(pictures: Pictures, draws: Draws, pad: int = 4) -> Pictures:
    """Shift, and mirror every other picture; draws 0 to 2."""
    mirrored = draws[:, 2] >= 0.5
    return shift(torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures), draws, pad)


def cutout(pictures: Pictures, draws: Draws, side: int = 16) -> Pictures:
    """Set a square to zero whose centre is anywhere (DeVries and Taylor 2017); draws 3 and 4."""

    def covered(pixels: int, draw: Draws) -> Tensor:
        after = torch.arange(pixels) - (draw * pixels).floor()
        return (after >= -(side // 2)) & (after < side - side // 2)

    height, width = pictures.shape[-2:]
    rows, columns = covered(height, draws[:, 3:4]), covered(width, draws[:, 4:5])
    return pictures.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def crop_flip_cutout(pictures: Pictures, draws: Draws) -> Pictures:
    """Both, as the FAM paper has them for SVHN without its AutoAugment."""
    return cutout(crop_flip(pictures, draws), draws)
