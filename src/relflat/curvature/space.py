"""What every estimator needs of a layer: directions in which its weight moves, and their products with a curvature.

By I4 kappa is ``E_R <W R, H[W R]>``. A space holds what stands for such a change of the weight: the change itself
(:class:`relflat.curvature.weight_space.WeightSpace`), or its effect on the layer's output (I5,
:class:`relflat.curvature.output_space.OutputSpace`). Shares are kept by group: independent samples, or all of them
together where samples are coupled.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from relflat.capture.calls import Call
from relflat.curvature.operators import Operator
from relflat.rng import Rng

Shares = Float[Tensor, " g"]


class Term(NamedTuple):
    """One term of the exact sum: shares are inner products of ``H direction`` with its partners."""

    direction: Tensor
    kappa: Tensor
    """Partner in kappa; carries the gradient in W and the features."""
    trace: Tensor
    """Partner in ``Tr H``."""


class Space(Protocol):
    """Changes of one layer's weight W of shape (d, m); a direction is a tensor of a shape of the space's own.

    Attributes:
        where: for names of methods: ``""`` in the outputs, ``"weight"`` in the weight.
    """

    where: str

    @property
    def calls(self) -> tuple[Call, ...]:
        """The endpoints at which curvature operators are taken."""

    @property
    def weight(self) -> Float[Tensor, "d m"]:
        """W, feature scales included."""

    def products_for_exact(self, *, adaptive: bool, trace: bool) -> int:
        """How many products the exact sum takes."""

    def columns(self) -> Iterator[Tensor]:
        """For each feature the change ``W e_t e_t'``: their quadratic forms add up to the adaptive kappa (I9)."""

    def terms(self) -> Iterator[Term]:
        """The terms of ``kappa = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'})`` over a basis (Def. 3)."""

    def probe(self, rng: Rng, *, adaptive: bool, rank: int = 1) -> Tensor:
        """A random ``W R`` whose quadratic form has mean kappa (I4; I6 in the outputs, R of this rank)."""

    def trace_probe(self, rng: Rng, *, rank: int) -> Tensor:
        """A random direction whose quadratic form has mean ``Tr H``."""

    def parts(self, direction: Tensor) -> list[Tensor]:
        """The direction as one tensor an endpoint."""

    def inner(self, one: Tensor, two: Tensor) -> Shares:
        """Inner products by group."""

    def pulled(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients at the endpoints as a direction."""

    def squared_norms(self, g: Tensor, rng: Rng, *, adaptive: bool, trace: bool) -> tuple[Shares, Shares]:
        """``||W' G||_F^2`` and ``||G||_F^2`` by group, G the gradient in the weight that ``g`` stands for (I7)."""

    def weight_product(self, operator: Operator, v: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """``H V`` in the weight, summed over all groups, without a graph."""


def product(operator: Operator, spaces: Sequence[Space], directions: Sequence[Tensor]) -> list[Tensor]:
    """``H`` times a direction in all spaces at once, whose endpoints are those of the operator."""
    parts = [p for space, direction in zip(spaces, directions, strict=True) for p in space.parts(direction)]
    found = iter(operator(parts))
    return [space.pulled([next(found) for _ in space.calls]) for space in spaces]
