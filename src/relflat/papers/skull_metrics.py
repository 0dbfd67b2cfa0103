"""How well skulls are completed, and whether the completion still depends on what was given."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from relflat.errors import DataError
from relflat.lab.data.batches import Batch
from relflat.lab.data.splits import Splits
from relflat.lab.tasks.metrics import Metric, run
from relflat.papers.skulls import SPACING, largest_piece

Volumes = Bool[Tensor, "n 1 z y x"]


def dice(one: Volumes, other: Volumes) -> Float[Tensor, " n"]:
    """Dice coefficients ``2 |A and B| / (|A| + |B|)``, sample by sample; 1 where both are empty."""
    common, sizes = _count(one & other), _count(one) + _count(other)
    return torch.where(sizes > 0, 2 * common / sizes.clamp_min(1), 1.0)


def _count(volumes: Volumes) -> Float[Tensor, " n"]:
    return volumes.flatten(1).sum(1).double()


def hausdorff(one: Volumes, other: Volumes, percentile: float | None = None) -> Float[Tensor, " n"]:
    """Hausdorff distances of the surfaces in mm (or their percentile); the grid's diagonal where one is empty."""
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    shape = torch.tensor(one.shape[2:], dtype=torch.float64)
    distances = torch.full((len(one),), SPACING * float((shape - 1).norm()), dtype=torch.float64)
    both = (_count(one) > 0) & (_count(other) > 0)
    if both.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of its deprecated argument
            found = compute_hausdorff_distance(
                one[both], other[both], include_background=True, percentile=percentile, spacing=SPACING
            )
        distances[both.cpu()] = found[:, 0].double().cpu()
    return distances


def spread(predictions: Volumes, targets: Volumes) -> float:
    """How much predictions for different inputs differ, relative to how much their targets do.

    The mean number of voxels in which two predictions disagree, over all pairs, divided by the same of the
    targets: 0 if all predictions are the same (collapse), 1 if they are as diverse as they should be.
    """
    wanted = _disagreement(targets)
    if not wanted > 0:
        raise DataError(f"spread compares different skulls, and these {len(targets)} are all the same; give more.")
    return _disagreement(predictions) / wanted


def _disagreement(volumes: Volumes) -> float:
    """Voxels in which two of n volumes differ, mean over pairs: ``sum_v 2 n/(n-1) p_v (1 - p_v)``."""
    count = len(volumes)
    share = volumes.double().mean(0)
    return float((share * (1 - share)).sum()) * 2 * count / max(count - 1, 1)


def scores(predictions: Volumes, defective: Volumes, complete: Volumes) -> dict[str, float]:
    """The figures of completed skulls, means over samples. Cost: .05 s a sample, the surfaces.

    ``dice`` of the whole; ``implant_dice`` of what was added (prediction minus defective) with what was missing;
    ``implant_piece_dice`` of the largest connected piece of what was added, which is what a surgeon would print;
    ``hd`` and ``hd95``, surface distances of the whole in mm; ``spread``.
    """
    added, missing = predictions & ~defective, complete & ~defective
    pieces = torch.stack([torch.from_numpy(largest_piece(volume[0].numpy()))[None] for volume in added.cpu()])
    return {
        "dice": float(dice(predictions, complete).mean()),
        "implant_dice": float(dice(added, missing).mean()),
        "implant_piece_dice": float(dice(pieces, missing).mean()),
        "hd": float(hausdorff(predictions, complete).mean()),
        "hd95": float(hausdorff(predictions, complete, 95).mean()),
        "spread": spread(predictions, complete),
    }


def evaluate(model: nn.Module, loss: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """The loss and the scores of a network that completes skulls; a voxel is bone where its logit is positive."""
    total, seen = 0.0, []
    for inputs, targets in batches:
        logits = run(model, inputs)
        total += float(loss(logits, targets)) * len(targets)
        assert isinstance(inputs, Tensor)
        seen.append((logits.cpu() > 0, inputs.cpu() > 0.5, targets.cpu() > 0.5))
    predictions, defective, complete = (torch.cat(part) for part in zip(*seen, strict=True))
    return {"loss": total / len(complete), **scores(predictions, defective, complete)}


DICE = Metric("dice", "Dice", "1 - Dice", evaluate)


def mean_shape(splits: Splits, score: Literal["dice", "implant_dice"] = "implant_dice") -> Volumes:
    """The baseline that learns one shape and looks at no input: the mean training skull, shape (1, 1, z, y, x).

    A voxel is bone where at least a share of the training skulls have bone; of the shares .05, .10, ... .95, the one
    that is best on the validation skulls.
    """
    samples = splits.validation
    assert isinstance(samples.inputs, Tensor)
    given = (samples.inputs > 0.5) & (score == "implant_dice")
    wanted = (samples.targets > 0.5) & ~given
    mean = splits.train.targets.mean(0, keepdim=True)
    shapes = (mean >= number / 20 for number in range(1, 20))
    return max(shapes, key=lambda shape: float(dice(shape & ~given, wanted).mean()))
