"""A weight itself as the space of its changes (I4): needs nothing but the parameter.

For parameters whatever the network does with them (recurrent and attention projections, unknown classes of
layers), and for a recurrent layer, where a change of the weight also changes its later inputs. All samples form
one group: the same directions serve the whole batch, so the variance is that of Hutchinson's estimator with one
probe a batch.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.uses import Matrix
from relflat.curvature.operators import Operator
from relflat.curvature.scales import divisor
from relflat.curvature.space import Shares, Term
from relflat.rng import Rng


class WeightSpace:
    """Changes of one weight; directions are Float[Tensor, "*s d m"], and there is a single group.

    Matrices of a stack (experts) have kappas of their own, which are added up. The scale is that of features in
    ``normalize_features``, 0 for those that are left out.
    """

    where = "weight"

    def __init__(self, matrix: Matrix, scale: Float[Tensor, " m"] | None) -> None:
        self.matrix, self.calls = matrix, (matrix.as_call(),)
        flat = matrix.weight()
        wide = torch.promote_types(flat.dtype, torch.float32)
        self.scale = torch.ones((), dtype=wide, device=flat.device) if scale is None else scale.to(wide)
        self.weight: Float[Tensor, "*s d m"] = flat.to(wide) * self.scale

    def products_for_exact(self, *, adaptive: bool, trace: bool) -> int:
        """One for each entry of the weight; each feature if adaptive."""
        size, rows = self.weight.numel(), self.weight.shape[-2]
        return size // rows + (size if trace else 0) if adaptive else size

    def columns(self) -> Iterator[Tensor]:
        """The columns of W, each alone."""
        for unit in self._entries((*self.weight.shape[:-2], 1, self.weight.shape[-1])):
            yield self.weight * unit

    def terms(self) -> Iterator[Term]:
        """``kappa = sum_{t,j} < (W W' e_j) e_t', H (e_j e_t') >``."""
        gram, (d, m) = self.weight @ self.weight.mT, self.weight.shape[-2:]
        for k, basis in enumerate(self._entries(tuple(self.weight.shape))):
            j = k // m % d
            yield Term(basis, gram[..., :, j, None] * basis[..., j, None, :], basis)

    def _entries(self, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Zeros with one 1, at each place in turn."""
        for k in range(math.prod(shape)):
            entry = self.weight.new_zeros(math.prod(shape))
            entry[k] = 1
            yield entry.reshape(shape)

    def probe(self, rng: Rng, *, adaptive: bool, rank: int = 1) -> Float[Tensor, "*s d m"]:
        """``W R``, see :func:`random_direction`."""
        return random_direction(self.weight, adaptive, rng)

    def trace_probe(self, rng: Rng, *, rank: int) -> Float[Tensor, "*s d m"]:
        """Independent signs."""
        return rng.signs(tuple(self.weight.shape), self.weight)

    def parts(self, direction: Float[Tensor, "*s d m"]) -> list[Tensor]:
        """The change of the parameter, in scaled features if there are scales."""
        return [self.matrix.back(direction / divisor(self.scale))]

    def weight_product(self, operator: Operator, v: Float[Tensor, "*s d m"]) -> Float[Tensor, "*s d m"]:
        """The same without a graph."""
        return self.pulled(operator(self.parts(v))).detach()

    def pulled(self, gradients: Sequence[Tensor]) -> Float[Tensor, "*s d m"]:
        """The gradient in the parameter, as the matrix is."""
        return self.matrix.view(gradients[0]).to(self.weight.dtype) / divisor(self.scale)

    def inner(self, one: Float[Tensor, "*s d m"], two: Float[Tensor, "*s d m"]) -> Shares:
        """Over all entries."""
        return (one * two).sum()[None]

    def squared_norms(
        self, g: Float[Tensor, "*s d m"], rng: Rng, *, adaptive: bool, trace: bool
    ) -> tuple[Shares, Shares]:
        """``||W' G||_F^2``, only its diagonal if adaptive, and ``||G||_F^2``."""
        back = (self.weight * g).sum(-2) if adaptive else self.weight.mT @ g
        return back.square().sum()[None], g.detach().square().sum()[None]


def random_direction(weight: Float[Tensor, "*s d m"], adaptive: bool, rng: Rng) -> Float[Tensor, "*s d m"]:
    """``W R``, R a matrix of independent signs, or a diagonal one; for a stack each with its own."""
    *stack, _, m = weight.shape
    signs = rng.signs((*stack, 1 if adaptive else m, m), weight)
    return weight * signs if adaptive else weight @ signs
