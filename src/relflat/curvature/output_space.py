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
    """All calls of one layer, as samples x positions; directions are Float[Tensor, "n t d"].

    A group is a sample, or the whole batch where samples are coupled after the layer; then every formula that
    treats groups as independent stays exact. Several calls of the layer, tokens, pixels are positions (samples too,
    where calls differ in their number: n is then 1). Channel groups c (grouped convolutions) split the outputs
    evenly, and each has features of its own.

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
        """Samples n, positions t, channel groups c, features m."""
        n = 1 if self._uneven else self.calls[0].samples
        return n, sum(self._positions), getattr(self.calls[0].module, "groups", 1), self.weight.shape[1]

    @functools.cached_property
    def _uneven(self) -> bool:
        return len({c.samples for c in self.calls}) > 1

    @property
    def _groups(self) -> int:
        return 1 if self.coupled else self.shape[0]

    @property
    def _many(self) -> int:
        """Positions of a group, in all channel groups."""
        n, t, c, _ = self.shape
        return n * t * c if self.coupled else t * c  # there may be no samples

    @functools.cached_property
    def _positions(self) -> list[int]:
        """Of each call; there may be none (an expert that nothing was routed to)."""
        sizes = [c.rows(c.output).shape for c in self.calls]
        return [n * t if self._uneven else t for n, t, _ in sizes]

    @functools.cached_property
    def features(self) -> Float[Tensor, "n t c m"]:
        """Phi of every sample and position, written out."""
        phi = self._joined([c.kind.features(c.module, self._input(c)) for c in self.calls])
        return phi if self.scale is None else phi / divisor(self.scale)

    def project(self, b: Float[Tensor, "g q m"]) -> Float[Tensor, "n t c q"]:
        """``b . phi`` for q directions a group, without writing phi out where the layer can do that."""
        b = b if self.scale is None else b / divisor(self.scale)
        return self._joined([c.kind.project(c.module, self._input(c), b) for c in self.calls])

    def energy(self) -> float:
        """``sum ||phi||^2`` over all rows."""
        return float(self._norms2().detach().sum(dtype=torch.float64))

    def _norms2(self) -> Float[Tensor, "n t c"]:
        """``||phi||^2`` of every row, without writing phi out."""
        ones = torch.ones_like(self.weight[0]) if self.scale is None else divisor(self.scale).pow(-2)
        parts = []
        for call in self.calls:
            x = self._input(call)
            x = x.square() if x.is_floating_point() else x
            parts.append(call.kind.project(call.module, x, ones[None, None]).squeeze(-1))
        return self._joined(parts)

    def _input(self, call: Call) -> Tensor:
        x = call.input().detach() if self.constant else call.input()
        return x.to(self.weight.dtype) if x.is_floating_point() else x

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Rows of all calls, (n, t, ...) each."""
        parts = [p.reshape(1, -1, *p.shape[2:]) if self._uneven else p for p in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _spread(self, s: Float[Tensor, "n t c"]) -> Float[Tensor, "n t d"]:
        """Give every output its channel group's number."""
        d, c = self.weight.shape[0], s.shape[-1]
        return s.expand(-1, -1, d) if c == 1 else s.repeat_interleave(d // c, dim=-1)

    @property
    def _weight_by_channel(self) -> Float[Tensor, "c o m"]:
        return self.weight.reshape(self.shape[2], -1, self.weight.shape[1])

    def _apply(self, phi: Float[Tensor, "n t c m"]) -> Float[Tensor, "n t d"]:
        """``W phi``, each channel group with its own rows of W."""
        return torch.einsum("ntcm,com->ntco", phi, self._weight_by_channel).flatten(2)

    def products_for_exact(self, *, adaptive: bool, trace: bool) -> int:
        """One for each pair of position and output; each feature if adaptive."""
        basis = self._many // self.shape[2] * self.weight.shape[0]
        return self.weight.shape[1] + (basis if trace else 0) if adaptive else basis

    def columns(self) -> Iterator[Tensor]:
        """``W (phi_t e_t)`` for each feature t."""
        for t in range(self.shape[3]):
            only = torch.zeros_like(self.features)
            only[..., t] = 1
            yield self._apply(self.features * only)

    def terms(self) -> Iterator[Term]:
        """I3: ``kappa = sum_{p,j} < (Phi Phi' e_p) (x) (W W' e_j), H (e_p (x) e_j) >`` for every group."""
        (n, t, c, m), d, g = self.shape, self.weight.shape[0], self._groups
        gram, features = self.weight @ self.weight.mT, self.features.reshape(g, self._many // c, c, m)
        for p in range(features.shape[1]):
            for j in range(d):
                basis = self.weight.new_zeros((g, features.shape[1], d))
                basis[:, p, j] = 1
                phi_p = features[:, p, j * c // d]
                near = self._spread(torch.einsum("gscm,gm->gsc", features, phi_p))  # Phi Phi' e_p
                partners = near * gram[:, j], near.detach() * basis[:, p : p + 1]
                yield Term(*(x.reshape(n, t, d) for x in (basis, *partners)))

    def probe(self, rng: Rng, *, adaptive: bool, rank: int = 1) -> Float[Tensor, "n t d"]:
        """I6: ``u = (W a)(b . phi)``, a and b Rademacher for each group; if adaptive ``u = W (b * phi)`` (I9).

        The mean of ``rank`` such, times the root of that, has the same mean quadratic form and is closer to normal.
        For a single position ``||phi||`` stands for ``b . phi``, whose square it is the mean of.
        """
        g, m = self._groups, self.shape[3]
        if adaptive:
            return self._apply(self.features * rng.signs((g, 1, m), self.weight)[:, None])
        return self._along(rng, lambda q: rng.signs((g, q, m), self.weight) @ self.weight.mT, rank)

    def trace_probe(self, rng: Rng, *, rank: int) -> Float[Tensor, "n t d"]:
        """The same with independent signs in place of ``W a``."""
        shape = self._groups, self.weight.shape[0]
        return self._along(rng, lambda q: rng.signs((shape[0], q, shape[1]), self.weight), rank).detach()

    def _along(self, rng: Rng, left: Callable[[int], Tensor], rank: int) -> Float[Tensor, "n t d"]:
        """Sums of products of ``b . phi`` and a direction of the outputs, (g, q, d), over q pairs."""
        if self._many == 1:
            return self._norms2().clamp_min(torch.finfo(self.weight.dtype).tiny).sqrt() * left(1)
        g, c, m = self._groups, *self.shape[2:]
        s = self.project(rng.signs((g, rank, m), self.weight)) / math.sqrt(rank)
        if rank == 1:
            return self._spread(s.squeeze(-1)) * left(1)
        along = left(rank).reshape(g, rank, c, -1)
        return torch.einsum("ntcq,nqco->ntco", s, along).flatten(2)

    def parts(self, direction: Float[Tensor, "n t d"]) -> list[Tensor]:
        """Cut into one tensor a call."""
        cut = torch.split(direction, self._positions, dim=1)
        return [c.from_rows(p) for c, p in zip(self.calls, cut, strict=True)]

    def pulled(self, gradients: Sequence[Tensor]) -> Float[Tensor, "n t d"]:
        """Gradients with respect to the calls' outputs, as rows."""
        pairs = zip(self.calls, gradients, strict=True)
        return self._joined([c.rows(x).to(self.weight.dtype) for c, x in pairs])

    def inner(self, one: Float[Tensor, "n t d"], two: Float[Tensor, "n t d"]) -> Shares:
        """Over positions and outputs."""
        return self._by_group((one * two).sum((1, 2)))

    def _by_group(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "g ..."]:
        return x.sum(0, keepdim=True) if self.coupled and x.shape[0] > 1 else x

    def squared_norms(
        self, g: Float[Tensor, "n t d"], rng: Rng, *, adaptive: bool, trace: bool
    ) -> tuple[Shares, Shares]:
        """``||W' G||_F^2`` and ``||G||_F^2`` of each group's ``G = sum_t g_t phi_t'``.

        Exact through Gram matrices of the positions where those are few. Else from the images ``G b`` of
        ``_SKETCH`` independent Rademacher vectors b a group, as ``E_b ||W' G b||^2`` is the same number.
        """
        c, m = self.shape[2:]
        if self._many == 1 and not adaptive:  # ||W'g||^2 ||phi||^2
            g, size = g[:, 0], self.features[:, 0, 0].square().sum(-1)
            kappa = (g @ self.weight).square().sum(-1) * size
            return kappa, g.detach().square().sum(-1) * size.detach() if trace else kappa
        if self._many > _FEW_POSITIONS and not adaptive:
            b = rng.signs((self._groups, _SKETCH, m), self.weight).mul_(_SKETCH**-0.5)
            images = self._by_group(self._images(self.project(b), g))
            kappa = _square(images @ self.weight)
            return kappa, _square(images.detach()) if trace else kappa
        by_channel = g.reshape(*g.shape[:-1], c, g.shape[-1] // c)
        back = torch.einsum("ntco,com->ntcm", by_channel, self._weight_by_channel)  # W' g
        if adaptive:
            kappa = self._by_group((back * self.features).sum((1, 2))).square().sum(-1)
        else:
            kappa = self._gram_product(back, self.features)
        if not trace:
            return kappa, kappa
        sides = (torch.split(x.detach(), 1, dim=2) for x in (by_channel, self.features))
        return kappa, torch.stack([self._gram_product(*pair) for pair in zip(*sides, strict=True)]).sum(0)

    def _images(self, s: Float[Tensor, "n t c q"], g: Float[Tensor, "n t d"]) -> Float[Tensor, "n q d"]:
        """``sum_t s_t g_t'``, each channel group by itself; neither side is laid out anew."""
        c = s.shape[2]
        if c > 1:
            return torch.einsum("ntcq,ntco->nqco", s, g.reshape(*g.shape[:-1], c, -1)).flatten(2)
        s = s.squeeze(2)
        return s.mT @ g if g.stride(-1) == 1 else (g.mT @ s).mT

    def _gram_product(self, x: Float[Tensor, "n t c a"], y: Float[Tensor, "n t c b"]) -> Shares:
        """``||sum_p x_p y_p'||_F^2`` over all p of a group."""
        rows = x[..., 0].numel() // max(1, self._groups)
        x, y = (z.reshape(self._groups, rows, z.shape[-1]) for z in (x, y))
        if x.shape[1] == 1:
            return x.square().sum((1, 2)) * y.square().sum((1, 2))
        return ((x @ x.mT) * (y @ y.mT)).sum((1, 2))

    def weight_product(self, operator: Operator, v: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """By way of the outputs (I5): ``sum_p (H [V phi])_p phi_p'``."""
        c, m = self.shape[2:]
        phi = self.features.detach().reshape(-1, c, m).movedim(1, 0)
        u = (phi @ v.reshape(c, -1, m).mT).movedim(0, 1).reshape(*self.shape[:2], -1)
        curved = self.pulled(operator(self.parts(u))).detach().reshape(phi.shape[1], c, -1).movedim(1, 0)
        return (curved.mT @ phi).flatten(0, 1)


def feature_std(calls: Sequence[Call]) -> Float[Tensor, " m"]:
    """Standard deviation of each feature over the calls' rows, a constant; 0 where a feature never varies."""
    features = OutputSpace.of(calls, constant=True).features
    return std_of_rows(features.flatten(0, 2), f"layer {calls[0].layer!r}")


def _square(x: Float[Tensor, "g q d"]) -> Shares:
    """The sum of squares of each group, as one product."""
    flat = x.flatten(1)
    return (flat[:, None] @ flat[:, :, None]).flatten()
