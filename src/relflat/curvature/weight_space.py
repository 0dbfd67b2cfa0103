"""A weight itself as the space of its changes (I4): needs nothing but the parameter.

For parameters whatever the network does with them (recurrent and attention projections, unknown classes of
layers), and for a recurrent layer, where a change of the weight also changes its later inputs. All samples form
one group: the same directions serve the whole batch, so the variance is that of Hutchinson's estimator with one
probe a batch.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.matrix import Matrix
from relflat.curvature.operators import Operator
from relflat.curvature.scales import divisor
from relflat.curvature.space import Shares, Term
from relflat.rng import Rng


class WeightSpace:
    """Changes of one weight; directions are Float[Tensor, "d m"], and there is a single group.

    Args:
        matrix: the weight.
        scale: feature scales of ``normalize_features``, 0 for features that are left out; or None.
    """

    where = "weight"

    def __init__(self, matrix: Matrix, scale: Float[Tensor, " m"] | None) -> None:
        self.matrix, self.calls = matrix, (matrix.as_call(),)
        flat = matrix.weight()
        wide = torch.promote_types(flat.dtype, torch.float32)
        self.scale = torch.ones((), dtype=wide, device=flat.device) if scale is None else scale.to(wide)
        self.weight: Float[Tensor, "d m"] = flat.to(wide) * self.scale

    def products_for_exact(self, *, adaptive: bool, trace: bool) -> int:
        """One for each entry of the weight; each feature if adaptive."""
        d, m = self.weight.shape
        return m + (d * m if trace else 0) if adaptive else d * m

    def columns(self) -> Iterator[Tensor]:
        """The columns of W, each alone."""
        for unit in torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device):
            yield self.weight * unit

    def terms(self) -> Iterator[Term]:
        """``kappa = sum_{t,j} < (W W' e_j) e_t', H (e_j e_t') >``."""
        gram = self.weight @ self.weight.mT
        for j in range(self.weight.shape[0]):
            for t in range(self.weight.shape[1]):
                basis = torch.zeros_like(self.weight)
                basis[j, t] = 1
                yield Term(basis, gram[:, j, None] * basis[j], basis)

    def probe(self, rng: Rng, *, adaptive: bool, rank: int = 1) -> Float[Tensor, "d m"]:
        """``W R``, see :func:`random_direction`."""
        return random_direction(self.weight, adaptive, rng)

    def trace_probe(self, rng: Rng, *, rank: int = 1) -> Float[Tensor, "d m"]:
        """Independent signs."""
        return rng.signs(tuple(self.weight.shape), self.weight)

    def product(self, operator: Operator, direction: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """``H V``, in scaled features if there are scales."""
        return self.pulled(operator([self.matrix.back(direction / divisor(self.scale))]))

    def weight_product(self, operator: Operator, v: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """The same without a graph."""
        return self.product(operator, v).detach()

    def pulled(self, gradients: Sequence[Tensor]) -> Float[Tensor, "d m"]:
        """The gradient in the parameter, as the matrix is."""
        return self.matrix.view(gradients[0]).to(self.weight.dtype) / divisor(self.scale)

    def inner(self, one: Float[Tensor, "d m"], two: Float[Tensor, "d m"]) -> Shares:
        """Over all entries."""
        return (one * two).sum()[None]

    def squared_norms(
        self, g: Float[Tensor, "d m"], rng: Rng, *, adaptive: bool, trace: bool
    ) -> tuple[Shares, Shares]:
        """``||W' G||_F^2``, only its diagonal if adaptive, and ``||G||_F^2``."""
        back = (self.weight * g).sum(0) if adaptive else self.weight.mT @ g
        return back.square().sum()[None], g.detach().square().sum()[None]


def random_direction(weight: Float[Tensor, "d m"], adaptive: bool, rng: Rng) -> Float[Tensor, "d m"]:
    """``W R``, R a matrix of independent signs, or a diagonal one."""
    m = weight.shape[1]
    return weight * rng.signs((m,), weight) if adaptive else weight @ rng.signs((m, m), weight)
