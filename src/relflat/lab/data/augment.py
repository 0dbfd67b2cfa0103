"""Random changes to training pictures; the draws follow from seed, epoch and place of the sample alone."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

DRAWS = 5  # uniform numbers a picture and epoch; each change says which it uses

Augment = Callable[[Float[Tensor, "n c h w"], Float[Tensor, "n draws"]], Float[Tensor, "n c h w"]]


def draws_for(samples: int, seed: int, epoch: int) -> Float[Tensor, "n draws"]:
    """Uniform numbers for all samples of an epoch, whatever the batches and however many processes."""
    generator = torch.Generator().manual_seed((1 << 60) + (seed << 20) + epoch)
    return torch.rand(samples, DRAWS, generator=generator)


def shift(
    pictures: Float[Tensor, "n c h w"], draws: Float[Tensor, "n draws"], pad: int = 4
) -> Float[Tensor, "n c h w"]:
    """Shift by up to ``pad`` pixels each way, zeros coming in; draws 0 and 1."""
    height, width = pictures.shape[-2:]
    padded = functional.pad(pictures, (pad, pad, pad, pad))
    down, right = (draws[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    sample = torch.arange(len(pictures))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def crop_flip(
    pictures: Float[Tensor, "n c h w"], draws: Float[Tensor, "n draws"], pad: int = 4
) -> Float[Tensor, "n c h w"]:
    """Shift, and mirror every other picture; draws 0 to 2."""
    mirrored = draws[:, 2] >= 0.5
    return shift(torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures), draws, pad)


def cutout(
    pictures: Float[Tensor, "n c h w"], draws: Float[Tensor, "n draws"], side: int = 16
) -> Float[Tensor, "n c h w"]:
    """Set a square to zero whose centre is anywhere (DeVries and Taylor 2017); draws 3 and 4."""
    height, width = pictures.shape[-2:]
    row, column = (draws[:, 3:4] * height).floor(), (draws[:, 4:5] * width).floor()
    rows = (torch.arange(height) - row + side // 2).ge(0) & (torch.arange(height) - row < side - side // 2)
    columns = (torch.arange(width) - column + side // 2).ge(0) & (torch.arange(width) - column < side - side // 2)
    hidden = rows[:, None, :, None] & columns[:, None, None, :]
    return pictures.masked_fill(hidden, 0.0)


def crop_flip_cutout(pictures: Float[Tensor, "n c h w"], draws: Float[Tensor, "n draws"]) -> Float[Tensor, "n c h w"]:
    """Both, as the FAM paper has them for SVHN without its AutoAugment."""
    return cutout(crop_flip(pictures, draws), draws)
