r"""The rows of the output layer a block of classes at a time: those of W, and those that kappa sees.

Kappa sees W itself, or a sketch of it, ``V = (W - mean row) G`` of shape (d, k). ``G = sqrt(m / k) Q`` has orthogonal
columns in random directions, so that ``E[G G'] = I``, and ``v(V)`` is an unbiased estimate of ``v(W)``.

With C the covariance of the rows of W under pi, averaged over tokens with weights ``a ||phi||^2``, and
``r = (Tr C)^2 / ||C||_F^2`` the number of directions in which it is spread (1 to m), the sketched kappa has the
relative standard error

    sqrt(2 (m - k) (m / r - 1) / (k (m - 1) (m + 2)))  =  about sqrt(2 / (k r)),  at most sqrt(2 / k)
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

Classes = slice | Tensor
"""A block of classes, or some of them by number."""


class Rows:
    """Rows in the precision of the sums, whatever the type of the weight; ``~`` is for "minus their mean".

    Attributes:
        weight: W.
        bias: b, or None.
        directions: G, or None where kappa sees W itself.
        dtype: of the sums.
        mean: the mean row of W.
        sketch: V, or None where kappa sees W itself.
        kappa_mean: the mean of the rows that kappa sees, 0 for a sketch.
        norms: ``||w~_c||^2`` of the rows that kappa sees.
    """

    def __init__(
        self,
        weight: Float[Tensor, "d m"],
        bias: Float[Tensor, " d"] | None,
        directions: Float[Tensor, "m k"] | None,
        dtype: torch.dtype,
        chunk_classes: int,
    ) -> None:
        self.weight, self.bias, self.dtype, self._chunk = weight, bias, dtype, chunk_classes
        self.directions = None if directions is None else directions.to(dtype)
        self.mean = self.kappa_mean = weight.mean(0, dtype=dtype)
        self.sketch: Tensor | None = None  # V = (W - mean row) G
        if self.directions is not None:
            blocks = [(self.of_weight(c) - self.mean) @ self.directions for c in self.classes()]
            self.sketch = torch.cat(blocks)
            self.kappa_mean = torch.zeros_like(self.sketch[0])
        # Kappa does not see a vector common to all rows: without the mean row, large common parts do not cancel.
        norms = [(self.of_kappa(c) - self.kappa_mean).square_().sum(1) for c in self.classes()]
        self.norms = torch.cat(norms)

    def classes(self) -> Iterator[slice]:
        """The blocks of classes."""
        return slices(len(self.weight), self._chunk)

    def of_weight(self, c: Classes) -> Float[Tensor, "c m"]:
        """Rows of W."""
        return self.weight[c].to(self.dtype)

    def of_kappa(self, c: Classes) -> Float[Tensor, "c r"]:
        """The rows that kappa sees."""
        return self.of_weight(c) if self.sketch is None else self.sketch[c]

    def bias_of(self, c: slice) -> Float[Tensor, " c"] | None:
        """The bias of some classes."""
        return None if self.bias is None else self.bias[c].to(self.dtype)


def slices(length: int, size: int) -> Iterator[slice]:
    """Pieces of ``range(length)``, each of ``size`` but for the last."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
