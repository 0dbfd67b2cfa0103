"""A layer's outputs as the space of its changes (I5): features, weight, and directions as rows."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.calls import Call
from relflat.curvature.operators import Operator
from relflat.curvature.scales import divisor, std_of_rows
from relflat.curvature.space import Shares, Term
from relflat.errors import LayerError
from relflat.rng import Rng

_FEW_POSITIONS = 16
_SKETCH = 8


@dataclass(frozen=True, eq=False)
class OutputSpace:
    """All calls of one layer, as independent groups x positions; directions are Float[Tensor, "g t d"].

    A group is a sample, or the whole batch where samples are coupled after the layer; then every formula that
    treats groups as independent stays exact. Several calls of the layer, tokens, pixels are positions. Channel
    groups c (grouped convolutions) split the outputs evenly, and each has features of its own.

    Attributes:
        calls: the calls, in order.
        weight: the layer's weight as (d, m), float32 or float64, times ``scale``.
        scale: kappa is that of ``phi / scale, W * scale``, without the features whose scale is 0; None for 1.
        coupled: whether all samples form one group.
        constant: whether features count as constants.
    """

    calls: tuple[Call, ...]
    weight: Float[Tensor, "d m"]
    scale: Float[Tensor, " m"] | None
    coupled: bool
    constant: bool
    where = ""

    @classmethod
    def of(
        cls, calls: Sequence[Call], scale: Tensor | None = None, *, coupled: bool = False, constant: bool = False
    ) -> "OutputSpace":
        """The space of one layer's calls.

        Raises:
            LayerError: the layer is not one linear map of one input.
        """
        for problem in filter(None, (c.kind.problem(c.module) for c in calls)):
            raise LayerError(problem.format(layer=calls[0].layer))
        weight = calls[0].weight.to(torch.promote_types(calls[0].weight.dtype, torch.float32))
        if scale is not None:
            scale = scale.to(weight.dtype)
            weight = weight * scale
        uneven = len({c.samples for c in calls}) > 1
        return cls(tuple(calls), weight, scale, coupled or uneven, constant)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Groups g, positions t, channel groups c, features m."""
        groups = 1 if self.coupled else self.calls[0].samples
        c = getattr(self.calls[0].module, "groups", 1)
        return groups, sum(self._positions), c, self.weight.shape[1]

    @functools.cached_property
    def _positions(self) -> list[int]:
        """Of each call; there may be none (an expert that nothing was routed to)."""
        sizes = [c.rows(c.output).shape for c in self.calls]
        return [n * t if self.coupled else t for n, t, _ in sizes]

    @functools.cached_property
    def features(self) -> Float[Tensor, "g t c m"]:
        """Phi of every group and position, written out."""
        phi = self._joined([c.kind.features(c.module, self._input(c)) for c in self.calls])
        return phi if self.scale is None else phi / divisor(self.scale)

    def project(self, b: Float[Tensor, "g q m"]) -> Float[Tensor, "g t c q"]:
        """``b . phi`` for q directions a group, without writing phi out where the layer can do that."""
        b = b if self.scale is None else b / divisor(self.scale)
        parts = []
        for call in self.calls:
            mine = b.expand(call.samples, -1, -1) if self.coupled else b
            parts.append(call.kind.project(call.module, self._input(call), mine))
        return self._joined(parts)

    def energy(self) -> float:
        """``sum ||phi||^2`` over all rows."""
        return float(self._norms2().detach().sum(dtype=torch.float64))

    def _norms2(self) -> Float[Tensor, "g t c"]:
        """``||phi||^2`` of every row, without writing phi out."""
        ones = torch.ones_like(self.weight[0]) if self.scale is None else divisor(self.scale).pow(-2)
        parts = []
        for call in self.calls:
            x = self._input(call)
            x = x.square() if x.is_floating_point() else x
            parts.append(call.kind.project(call.module, x, ones.expand(call.samples, 1, -1)).squeeze(-1))
        return self._joined(parts)

    def _input(self, call: Call) -> Tensor:
        x = call.input().detach() if self.constant else call.input()
        return x.to(self.weight.dtype) if x.is_floating_point() else x

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Rows of all calls, (n, t, ...) each, by group."""
        parts = [p.reshape(1, -1, *p.shape[2:]) if self.coupled else p for p in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _spread(self, s: Float[Tensor, "g t c"]) -> Float[Tensor, "g t d"]:
        """Give every output its channel group's number."""
        d, c = self.weight.shape[0], s.shape[-1]
        return s.expand(-1, -1, d) if c == 1 else s.repeat_interleave(d // c, dim=-1)

    def _by_channel(self, g: Float[Tensor, "g t d"]) -> Float[Tensor, "g t c o"]:
        c = self.shape[2]
        return g.reshape(*g.shape[:-1], c, g.shape[-1] // c)

    @property
    def _weight_by_channel(self) -> Float[Tensor, "c o m"]:
        return self.weight.reshape(self.shape[2], -1, self.weight.shape[1])

    def _apply(self, phi: Float[Tensor, "g t c m"]) -> Float[Tensor, "g t d"]:
        """``W phi``, each channel group with its own rows of W."""
        return torch.einsum("gtcm,com->gtco", phi, self._weight_by_channel).flatten(2)

    def products_for_exact(self, *, adaptive: bool, trace: bool) -> int:
        """One for each pair of position and output; each feature if adaptive."""
        basis = self.shape[1] * self.weight.shape[0]
        return self.weight.shape[1] + (basis if trace else 0) if adaptive else basis

    def columns(self) -> Iterator[Tensor]:
        """``W (phi_t e_t)`` for each feature t."""
        for t in range(self.shape[3]):
            only = torch.zeros_like(self.features)
            only[..., t] = 1
            yield self._apply(self.features * only)

    def terms(self) -> Iterator[Term]:
        """I3: ``kappa = sum_{p,j} < (Phi Phi' e_p) (x) (W W' e_j), H (e_p (x) e_j) >`` for every group."""
        (g, t, c, _), d = self.shape, self.weight.shape[0]
        gram = self.weight @ self.weight.mT
        for p in range(t):
            for j in range(d):
                basis = self.weight.new_zeros((g, t, d))
                basis[:, p, j] = 1
                phi_p = self.features[:, p, j * c // d]
                near = self._spread(torch.einsum("gscm,gm->gsc", self.features, phi_p))  # Phi Phi' e_p
                yield Term(basis, near * gram[:, j], near.detach() * basis[:, p : p + 1])

    def probe(self, rng: Rng, *, adaptive: bool, rank: int = 1) -> Float[Tensor, "g t d"]:
        """I6: ``u = (W a)(b . phi)``, a and b Rademacher for each group; if adaptive ``u = W (b * phi)`` (I9).

        The mean of ``rank`` such, times the root of that, has the same mean quadratic form and is closer to normal.
        For a single position ``||phi||`` stands for ``b . phi``, whose square it is the mean of.
        """
        g, _, _, m = self.shape
        if adaptive:
            return self._apply(self.features * rng.signs((g, 1, m), self.weight)[:, None])
        return self._along(rng, lambda q: rng.signs((g, q, m), self.weight) @ self.weight.mT, rank)

    def trace_probe(self, rng: Rng, *, rank: int = 1) -> Float[Tensor, "g t d"]:
        """The same with independent signs in place of ``W a``."""
        shape = self.shape[0], self.weight.shape[0]
        return self._along(rng, lambda q: rng.signs((shape[0], q, shape[1]), self.weight), rank).detach()

    def _along(self, rng: Rng, left: Callable[[int], Tensor], rank: int) -> Float[Tensor, "g t d"]:
        """Sums of products of ``b . phi`` and a direction of the outputs, (g, q, d), over q pairs."""
        g, t, c, m = self.shape
        if t * c == 1:
            return self._norms2().clamp_min(torch.finfo(self.weight.dtype).tiny).sqrt() * left(1)
        s = self.project(rng.signs((g, rank, m), self.weight)) / math.sqrt(rank)
        if rank == 1:
            return self._spread(s.squeeze(-1)) * left(1)
        along = left(rank).reshape(g, rank, c, -1)
        return torch.einsum("gtcq,gqco->gtco", s, along).flatten(2)

    def product(self, operator: Operator, direction: Float[Tensor, "g t d"]) -> Float[Tensor, "g t d"]:
        """Cut the direction into one tensor a call, and join what comes back."""
        parts = torch.split(direction, self._positions, dim=1)
        return self.pulled(operator([c.from_rows(p) for c, p in zip(self.calls, parts, strict=True)]))

    def pulled(self, gradients: Sequence[Tensor]) -> Float[Tensor, "g t d"]:
        """Gradients with respect to the calls' outputs, as rows."""
        pairs = zip(self.calls, gradients, strict=True)
        return self._joined([c.rows(x).to(self.weight.dtype) for c, x in pairs])

    def inner(self, one: Float[Tensor, "g t d"], two: Float[Tensor, "g t d"]) -> Shares:
        """Over positions and outputs."""
        return (one * two).sum((1, 2))

    def squared_norms(
        self, g: Float[Tensor, "g t d"], rng: Rng, *, adaptive: bool, trace: bool
    ) -> tuple[Shares, Shares]:
        """``||W' G||_F^2`` and ``||G||_F^2`` of each group's ``G = sum_t g_t phi_t'``.

        Exact through Gram matrices of the positions where those are few. Else from the images ``G b`` of
        ``_SKETCH`` independent Rademacher vectors b a group, as ``E_b ||W' G b||^2`` is the same number.
        """
        groups, t, c, m = self.shape
        if t * c == 1 and not adaptive:  # ||W'g||^2 ||phi||^2
            g, size = g[:, 0], self.features[:, 0, 0].square().sum(-1)
            return (g @ self.weight).square().sum(-1) * size, g.detach().square().sum(-1) * size.detach()
        by_channel = self._by_channel(g)
        if t * c > _FEW_POSITIONS and not adaptive:
            b = rng.signs((groups, _SKETCH, m), self.weight)
            images = torch.einsum("gtcq,gtco->gqco", self.project(b), by_channel).flatten(2)
            kappa = (images @ self.weight).square().sum((1, 2)) / _SKETCH
            return kappa, images.detach().square().sum((1, 2)) / _SKETCH
        back = torch.einsum("gtco,com->gtcm", by_channel, self._weight_by_channel)  # W' g
        if adaptive:
            kappa = (back * self.features).sum((1, 2)).square().sum(-1)
        else:
            kappa = _gram_product(back.flatten(1, 2), self.features.flatten(1, 2))
        if not trace:
            return kappa, kappa
        by_channel, phi = by_channel.detach(), self.features.detach()
        return kappa, torch.stack([_gram_product(by_channel[:, :, i], phi[:, :, i]) for i in range(c)]).sum(0)

    def weight_product(self, operator: Operator, v: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """By way of the outputs (I5): ``sum_p (H [V phi])_p phi_p'``."""
        c, m = self.shape[2:]
        phi = self.features.detach().reshape(-1, c, m).movedim(1, 0)
        u = (phi @ v.reshape(c, -1, m).mT).movedim(0, 1).reshape(*self.shape[:2], -1)
        curved = self.product(operator, u).detach().reshape(phi.shape[1], c, -1).movedim(1, 0)
        return (curved.mT @ phi).flatten(0, 1)


def feature_std(calls: Sequence[Call]) -> Float[Tensor, " m"]:
    """Standard deviation of each feature over the calls' rows, a constant; 0 where a feature never varies."""
    features = OutputSpace.of(calls, constant=True).features
    return std_of_rows(features.flatten(0, 2), f"layer {calls[0].layer!r}")


def _gram_product(x: Float[Tensor, "g p a"], y: Float[Tensor, "g p b"]) -> Shares:
    """``||sum_p x_p y_p'||_F^2``."""
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * y.square().sum((1, 2))
    return ((x @ x.mT) * (y @ y.mT)).sum((1, 2))
