"""The tasks on skulls, completing one whose vault has a hole, and their networks and losses.

Networks give logits of shape (n, 1, 48, 48, 48) for a defective skull of the same shape. MONAI is imported when a
network or a loss is built: it takes seconds, and other tasks do without.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.lab.tasks.records import read
from relflat.papers.skull_metrics import DICE
from relflat.papers.skulls import splits

CHANNELS = (8, 16, 32, 64, 8)  # of the five strided convolutions; the last leaves 8 * 2^3 = 64 features
GIVEN = 10.0  # logit added where bone was given


def _block(inputs: int, outputs: int, **options: Any) -> nn.Module:
    """A 3x3x3 convolution of stride 2 that halves the grid, rounding up, or doubles it, and a PReLU."""
    from monai.networks.blocks.convolutions import Convolution

    return Convolution(3, inputs, outputs, strides=2, kernel_size=3, act="PRELU", **options)


class Autoencoder(nn.Module):
    """The paper's autoencoder on 48^3 voxels: five strided convolutions, eight numbers, five deconvolutions.

    The encoder goes 48 -> 24 -> 12 -> 6 -> 3 -> 2 voxels a side, the decoder the way back. Between them are two
    linear layers, and no nonlinearity, as the latent numbers are coordinates: ``to_latent`` (8 x 64) and
    ``from_latent`` (64 x 8), the layer whose kappa the paper adds. The encoder normalises each skull alone (without
    it, training rests for long at one skull for all inputs), so samples are never coupled.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, latent: int = 8) -> None:
        super().__init__()
        pairs = zip((1, *channels), channels, strict=False)
        self.encoder = nn.Sequential(*(_block(*pair, norm="INSTANCE") for pair in pairs))
        self.to_latent = nn.Linear(channels[-1] * 8, latent)
        self.from_latent = nn.Linear(latent, channels[-1] * 8)
        self.decoder = nn.Sequential()
        for number, (inputs, outputs) in enumerate(zip(channels[::-1], (*channels[-2::-1], 1), strict=True)):
            padding = min(number, 1)  # 2 -> 3 voxels, then doubled
            options = {"norm": None, "is_transposed": True, "output_padding": padding, "conv_only": outputs == 1}
            self.decoder.append(_block(inputs, outputs, **options))

    def forward(self, defective: Float[Tensor, "n 1 48 48 48"]) -> Float[Tensor, "n 1 48 48 48"]:
        """Return logits of the complete skull."""
        latent = self.to_latent(self.encoder(defective).flatten(1))
        return self.decoder(self.from_latent(latent).unflatten(1, (-1, 2, 2, 2)))


class Completion(nn.Module):
    """MONAI's U-Net with skip connections, which only adds: bone that was given keeps a large positive logit.

    Without that, copying the input is most of what the Dice loss rewards, and the hole stays open. The body goes
    48 -> 24 -> 12 -> 6 -> 3 voxels a side and back, with eight channels; ``output`` starts at "nothing is missing".
    """

    def __init__(self, channels: tuple[int, ...] = (8, 16, 32, 64, 64)) -> None:
        from monai.networks.nets.unet import UNet

        super().__init__()
        self.body = UNet(3, 1, channels[0], channels, strides=(2,) * (len(channels) - 1), norm="INSTANCE")
        self.output = nn.Conv3d(channels[0], 1, 1)
        self.output.bias = nn.Parameter(torch.tensor([-3.0]))

    def forward(self, defective: Float[Tensor, "n 1 48 48 48"]) -> Float[Tensor, "n 1 48 48 48"]:
        """Return logits of the complete skull."""
        return self.output(self.body(defective)) + GIVEN * defective


def dice_loss() -> nn.Module:
    """One minus the soft Dice coefficient, mean over skulls."""
    from monai.losses.dice import DiceLoss

    return DiceLoss(sigmoid=True)


def dice_cross_entropy() -> nn.Module:
    """The same plus the binary cross-entropy of the voxels, which has a gradient where Dice has almost none."""
    from monai.losses.dice import DiceCELoss

    return DiceCELoss(sigmoid=True)


NAMED = {each.__name__: each for each in (splits, Autoencoder, Completion, dice_loss, dice_cross_entropy)} | {
    "DICE": DICE
}
SKULLS, SKULLS_UNET = read(
    Path(__file__).with_name("tasks.toml"), "skulls", "skulls-unet", own={**NAMED, "DICE": DICE}
)
