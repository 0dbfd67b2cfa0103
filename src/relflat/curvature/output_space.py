"""A tapped layer in a forward pass, seen as rows: features, weight, and directions in its output space."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.capture.calls import Call
from relflat.capture.kinds import dropping_adapter, rows
from relflat.errors import LayerError, warn


@dataclass(frozen=True, eq=False)
class Site:
    """All calls of one layer, as independent groups x positions.

    A group is a sample, or the whole batch where samples are coupled after the layer; then every formula that
    treats groups as independent stays exact. Several calls of the layer, tokens, pixels are positions.

    Attributes:
        calls: the calls, in order.
        weight: the layer's weight as (d, m), float32 or float64, times ``scale``.
        scale: kappa is that of ``phi / scale, W * scale``, without the features whose scale is 0; None for 1.
        coupled: whether all samples form one group.
        constant: whether features count as constants (``gradient="weights"``).
    """

    calls: tuple[Call, ...]
    weight: Float[Tensor, "d m"]
    scale: Float[Tensor, " m"] | None
    coupled: bool
    constant: bool

    @classmethod
    def of(
        cls,
        calls: Sequence[Call],
        *,
        scale: Float[Tensor, " m"] | None = None,
        coupled: bool = False,
        constant: bool = False,
    ) -> "Site":
        """Build the site of one layer's calls.

        Raises:
            LayerError: if the layer is not one linear map of one input.
        """
        for name in filter(None, (dropping_adapter(c.module) for c in calls)):
            raise LayerError(
                f"adapter {name!r} of layer {calls[0].layer!r} has active dropout (lora_dropout), so it sees other "
                "features than the base layer does, and the two are not one linear map with a kappa; set "
                "lora_dropout=0, or name a factor by itself, such as "
                f"'{calls[0].layer}.lora_B.{name}', whose kappa is defined"
            )
        weight = calls[0].weight.to(torch.promote_types(calls[0].weight.dtype, torch.float32))
        if scale is not None:
            scale = scale.to(weight.dtype)
            weight = weight * scale
        uneven = len({samples_of(c) for c in calls}) > 1
        return cls(tuple(calls), weight, scale, coupled or uneven, constant)

    @property
    def layer(self) -> str:
        """Qualified name of the layer."""
        return self.calls[0].layer

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Groups g, positions t, channel groups c, features m."""
        groups = 1 if self.coupled else samples_of(self.calls[0])
        c = getattr(self.calls[0].module, "groups", 1)
        return groups, sum(self._positions), c, self.weight.shape[1]

    @functools.cached_property
    def _positions(self) -> list[int]:
        """Positions of each call; none of its samples may be there (an expert that nothing was routed to)."""
        sizes = [rows(c.kind, c.module, c.output).shape for c in self.calls]
        return [n * t if self.coupled else t for n, t, _ in sizes]

    @functools.cached_property
    def features(self) -> Float[Tensor, "g t c m"]:
        """Phi of every group and position, written out."""
        parts = [self._regroup(c.kind.features(c.module, self._input(c))) for c in self.calls]
        phi = _joined(parts)
        return phi if self.scale is None else phi / divisor(self.scale)

    def energy(self) -> float:
        """``sum ||phi||^2`` over all rows, without writing phi out."""
        ones = torch.ones(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        ones = ones if self.scale is None else ones / divisor(self.scale).square()
        total = 0.0
        for call in self.calls:
            x = self._input(call).detach()
            x = x.square() if x.is_floating_point() else x
            each = call.kind.project(call.module, x, ones.expand(samples_of(call), 1, -1))
            total += float(each.sum(dtype=torch.float64))
        return total

    def project(self, b: Float[Tensor, "g q m"]) -> Float[Tensor, "g t c q"]:
        """``b . phi`` for q directions a group, without writing phi out where the layer can do that."""
        b = b if self.scale is None else b / divisor(self.scale)
        parts = []
        for call in self.calls:
            mine = b.expand(samples_of(call), -1, -1) if self.coupled else b
            parts.append(self._regroup(call.kind.project(call.module, self._input(call), mine)))
        return _joined(parts)

    def spread(self, s: Float[Tensor, "g t c"]) -> Float[Tensor, "g t d"]:
        """Give every output its channel group's number."""
        d, c = self.weight.shape[0], s.shape[-1]
        return s.expand(-1, -1, d) if c == 1 else s.repeat_interleave(d // c, dim=-1)

    def apply(self, phi: Float[Tensor, "g t c m"]) -> Float[Tensor, "g t d"]:
        """``W phi``, each channel group with its own rows of W."""
        c = phi.shape[2]
        by_group = self.weight.reshape(c, -1, self.weight.shape[-1])
        return torch.einsum("gtcm,com->gtco", phi, by_group).flatten(2)

    def split(self, u: Float[Tensor, "g t d"]) -> list[Tensor]:
        """Cut a direction into one tensor a call, each shaped and typed as that call's output."""
        parts = []
        for part, call in zip(torch.split(u, self._positions, dim=1), self.calls, strict=True):
            last = part.reshape(call.outputs_last().shape)
            back = call.kind.outputs_back(call.module, last).reshape(call.output.shape)
            parts.append(back.to(call.output.dtype).contiguous())
        return parts

    def join(self, grads: Sequence[Tensor]) -> Float[Tensor, "g t d"]:
        """Undo :meth:`split`: gradients with respect to the calls' outputs, as rows."""
        parts = [rows(c.kind, c.module, x) for c, x in zip(self.calls, grads, strict=True)]
        return _joined([self._regroup(p.to(self.weight.dtype)) for p in parts])

    def _input(self, call: Call) -> Tensor:
        x = call.input().detach() if self.constant else call.input()
        return x.to(self.weight.dtype) if x.is_floating_point() else x

    def _regroup(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, *x.shape[2:]) if self.coupled else x


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def samples_of(call: Call) -> int:
    """How many samples a call saw; one if it had no batch dimension."""
    last = call.outputs_last()
    return last.shape[0] if last.ndim > 1 else 1


def feature_std(calls: Sequence[Call]) -> Float[Tensor, " m"]:
    """Standard deviation of each feature over the calls' rows, a constant; 0 where a feature never varies."""
    return std_of_rows(Site.of(calls, constant=True).features.flatten(0, 2), f"layer {calls[0].layer!r}")


def std_of_rows(phi: Float[Tensor, "n m"], whose: str) -> Float[Tensor, " m"]:
    """Standard deviation of each column; 0 where it never varies, with a warning if one row is all there is."""
    if phi.shape[0] < 2:
        warn(
            f"{whose} has a single row of features in this batch, so none varies and kappa in normalised features "
            "is 0 there; use larger batches (drop_last=True leaves out a short last one)"
        )
    return std_of(phi.var(0, correction=0), phi.mean(0), phi.dtype)


def std_of(
    variance: Float[Tensor, " m"], mean: Float[Tensor, " m"], dtype: torch.dtype
) -> Float[Tensor, " m"]:
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
