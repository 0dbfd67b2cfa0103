"""Moments of features over all of the data, put together from batches and ranks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """How many rows of features there were, their mean, summed squared deviations from it, and their dtype."""

    count: int
    mean: Float[Tensor, " m"]
    squares: Float[Tensor, " m"]
    dtype: torch.dtype

    @classmethod
    def of(cls, features: Float[Tensor, "n m"]) -> "Moments":
        """Those of some rows, in float64."""
        phi = features.double()
        return cls(phi.shape[0], phi.mean(0), phi.var(0, correction=0) * phi.shape[0], features.dtype)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both parts together (Chan et al. 1983), where those of the first are."""
        count, delta = self.count + other.count, other.mean.to(self.mean.device) - self.mean
        between = delta.square() * self.count * other.count / count
        squares = self.squares + other.squares.to(self.squares.device) + between
        return Moments(count, self.mean + delta * other.count / count, squares, self.dtype)
