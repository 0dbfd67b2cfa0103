"""The tasks on skulls: completing one whose vault has a hole."""

from dataclasses import replace

from relflat.lab.tasks import Adam, Task, cosine
from relflat.papers.skull_metrics import DICE
from relflat.papers.skull_models import Autoencoder, Completion, dice_cross_entropy, dice_loss
from relflat.papers.skulls import splits

SKULLS = Task(
    name="skulls",
    summary="deformations of one real CT, 48^3 voxels, a hole in each vault; autoencoder with latent 8; 100 train, "
    "40 validation, 50 test and the same 50 with larger holes",
    splits=splits,
    model=Autoencoder,
    loss=dice_loss,
    layer="from_latent",
    optimizer=Adam(lr=3e-3),
    schedule=cosine,
    epochs=64,
    batch_size=5,
    metric=DICE,
    evaluation_size=10,
    monitored=5,
)

SKULLS_UNET = replace(
    SKULLS,
    name="skulls-unet",
    summary="deformations of one real CT, 48^3 voxels, a hole in each vault; U-Net that only adds",
    model=Completion,
    loss=dice_cross_entropy,
    layer="output",
    optimizer=Adam(lr=2e-3),
    epochs=32,
    batch_size=2,
)
