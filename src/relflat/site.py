"""A tapped layer in a forward pass, seen as rows: features, weight, and directions in its output space."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.layers import rows
from relflat.record import Call


@dataclass(frozen=True, eq=False)
class Site:
    """All calls of one layer, as samples x positions.

    Several calls of the layer, tokens and so on are positions of a sample. Samples that are coupled after
    the layer form a single group, so that every formula that treats groups as independent stays exact.

    Attributes:
        calls: the calls, in order.
        phi: features, float32 or float64.
        weight: the layer's weight, same dtype.
    """

    calls: tuple[Call, ...]
    phi: Float[Tensor, "g t m"]
    weight: Float[Tensor, "d m"]

    @classmethod
    def of(
        cls, calls: Sequence[Call], *, scale: Float[Tensor, " m"] | None = None, coupled: bool = False
    ) -> "Site":
        """Build the site of one layer's calls.

        Args:
            calls: the calls of one layer.
            scale: if given, kappa of the function-preserving rescaling ``phi / scale, W * scale``.
            coupled: whether samples influence each other after the layer.
        """
        phis = [rows(c.module, c.features()) for c in calls]
        if coupled or len({p.shape[0] for p in phis}) > 1:
            phis = [p.reshape(1, -1, p.shape[-1]) for p in phis]
        wide = torch.promote_types(phis[0].dtype, torch.float32)
        phi, weight = torch.cat(phis, dim=1).to(wide), calls[0].weight.to(wide)
        if scale is not None:
            phi, weight = phi / scale.to(wide), weight * scale.to(wide)
        return cls(tuple(calls), phi, weight)

    @property
    def layer(self) -> str:
        """Qualified name of the layer."""
        return self.calls[0].layer

    def detached_features(self) -> "Site":
        """The same site with constant features: derivatives reach the weight only."""
        return replace(self, phi=self.phi.detach())

    def split(self, u: Float[Tensor, "g t d"]) -> list[Tensor]:
        """Cut a direction into one tensor a call, each shaped and typed as that call's output."""
        sizes = [c.output.numel() // (u.shape[0] * u.shape[-1]) for c in self.calls]
        parts = torch.split(u, sizes, dim=1)
        return [p.reshape(c.output.shape).to(c.output.dtype) for p, c in zip(parts, self.calls, strict=True)]

    def join(self, grads: Sequence[Tensor]) -> Float[Tensor, "g t d"]:
        """Undo :meth:`split`: gradients with respect to the calls' outputs, as rows."""
        g, d = self.phi.shape[0], self.weight.shape[0]
        return torch.cat([x.to(self.phi.dtype).reshape(g, -1, d) for x in grads], dim=1)


def feature_std(calls: Sequence[Call]) -> Float[Tensor, " m"]:
    """Standard deviation of each feature over the calls' rows; 1 where a feature is constant (dead)."""
    phi = torch.cat([rows(c.module, c.features()).detach().flatten(0, 1) for c in calls])
    return safe_std(phi.to(torch.promote_types(phi.dtype, torch.float32)).var(0, correction=0))


def safe_std(variance: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Square root, with 1 in place of 0."""
    return torch.where(variance > 0, variance, 1.0).sqrt()
