"""Standard deviations of features, and division by them (``normalize_features``)."""

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.errors import warn


def std_of_rows(phi: Float[Tensor, "n m"], whose: str) -> Float[Tensor, " m"]:
    """Standard deviation of each column; 0 where it never varies, with a warning if one row is all there is."""
    if phi.shape[0] < 2:
        warn(
            f"{whose} has a single row of features in this batch, so none varies and kappa in normalised features "
            "is 0 there; use larger batches (drop_last=True leaves out a short last one)"
        )
    return std_of(phi.var(0, correction=0), phi.mean(0), phi.dtype)


def std_of(variance: Float[Tensor, " m"], mean: Float[Tensor, " m"], dtype: torch.dtype) -> Float[Tensor, " m"]:
    """Square root; 0 for a feature that never varies: less than ten roundings of its mean in the features' dtype."""
    rounding = 10 * torch.finfo(dtype).eps * mean
    return torch.where(variance > rounding.square(), variance, 0.0).sqrt()


def divisor(scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What features are divided by: the scale, and infinity where it is 0, which leaves the feature out.

    A feature that never varies has no unit of its own: ``W_j sigma_j`` is 0 there, and so is ``phi_j / sigma_j``
    for a dead one (0 throughout). A constant other than 0 acts as a bias does and belongs left out like a bias;
    the limit of ``phi_j / sigma_j`` would be infinite.
    """
    return torch.where(scale > 0, scale, torch.inf)
