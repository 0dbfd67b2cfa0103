"""Kappa from products with the Hessian with respect to the weight itself (identity I4).

Needs nothing but the parameter, whatever the layer does with it, and is the form for a layer that feeds
itself (a recurrent use), where a change of the weight also changes the later inputs. All samples form one
group: the same directions serve the whole batch, so its variance is that of plain Hutchinson.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.errors import ConfigError, LayerError, LossError
from relflat.operators import differentiate
from relflat.probes import Contributions, Gradient
from relflat.record import Call
from relflat.rng import rademacher


class WeightSpace:
    """The Hessian of the loss in one weight, and the quadratic forms that kappa is made of.

    Args:
        loss: a scalar.
        call: a call of the layer; its weight must be a leaf that requires a gradient.
        scale: feature scales of ``normalize_features``, or None.
        adaptive: the adaptive form.
        gradient: ``"full"`` or ``"weights"``.
        create_graph: whether products must be differentiable.
    """

    def __init__(
        self,
        loss: Tensor,
        call: Call,
        *,
        scale: Float[Tensor, " m"] | None,
        adaptive: bool,
        gradient: Gradient,
        create_graph: bool,
    ) -> None:
        parameter = call.weight
        if not parameter.requires_grad:
            raise LayerError(
                f"layer {call.layer!r} feeds itself, so its curvature is taken in its weight, and that is frozen "
                "(requires_grad=False); unfreeze it while FAM or the measurement runs"
            )
        if gradient == "frozen":
            raise ConfigError(
                f"gradient='frozen' keeps the gradient through the features, which layer {call.layer!r} does not "
                "show as it feeds itself; use gradient='full' or 'weights'"
            )
        self.parameter, self.adaptive, self.gradient = parameter, adaptive, gradient
        self.create_graph = create_graph
        self.matrix = parameter.flatten(1)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.scale = torch.ones((), dtype=wide, device=parameter.device) if scale is None else scale.to(wide)
        self.weight: Float[Tensor, "d m"] = self.matrix.to(wide) * self.scale
        (slope,) = differentiate([loss], [parameter], None, create_graph=True)
        if slope is None or not slope.requires_grad:
            raise LossError(
                f"the gradient of the loss does not change with the weight of layer {call.layer!r}: its Hessian is "
                "zero wherever it exists; use a smooth loss"
            )
        self.slope = slope

    def product(self, direction: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """The Hessian in the (scaled) weight times a direction. Cost: two backward passes."""
        v = (direction / self.scale).reshape(self.parameter.shape).to(self.parameter.dtype)
        (found,) = differentiate([self.slope], [self.parameter], [v], create_graph=self.create_graph)
        curved = torch.zeros_like(self.parameter) if found is None else found
        return curved.flatten(1).to(self.weight.dtype) / self.scale

    def quadratic(self, direction: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
        """``<D, H D>``, with the curvature constant unless ``gradient="full"``."""
        if self.gradient == "full":
            return (direction * self.product(direction)).sum()
        linear = (direction * self.product(direction.detach())).sum()
        return 2 * linear - linear.detach()

    def products_for_exact(self, *, trace: bool) -> int:
        """How many products :meth:`exact` takes."""
        d, m = self.weight.shape
        return d * m if trace or not self.adaptive else m

    def exact(self, *, trace: bool) -> Contributions:
        """``sum_{t,j} ((W W') e_j)' (H e_j e_t')_t``: one product for each entry of the weight."""
        d, m = self.weight.shape
        total, diagonal = self.weight.new_zeros(()), self.weight.new_zeros(())
        if self.adaptive:
            for t in range(m):
                column = torch.zeros_like(self.weight)
                column[:, t] = 1
                total = total + self.quadratic(self.weight * column)
        gram = self.weight @ self.weight.mT
        for j in range(d if trace or not self.adaptive else 0):
            for t in range(m):
                basis = torch.zeros_like(self.weight)
                basis[j, t] = 1
                curved = self.product(basis)
                diagonal = diagonal + curved[j, t].detach()
                if not self.adaptive:
                    curved = curved if self.gradient == "full" else curved.detach()
                    total = total + gram[j] @ curved[:, t]
        return Contributions(
            total.reshape(1, 1), diagonal.reshape(1, 1) if trace else None, "exact(weight)", True
        )

    def sampled(self, *, probes: int, trace: bool, rng: torch.Generator) -> Contributions:
        """``<W R, H W R>`` with R of independent signs, diagonal if adaptive."""
        kappas, traces, m = [], [], self.weight.shape[1]
        for _ in range(probes):
            if self.adaptive:
                kappas.append(self.quadratic(self.weight * rademacher((m,), self.weight, rng)))
            else:
                kappas.append(self.quadratic(self.weight @ rademacher((m, m), self.weight, rng)))
            if trace:
                signs = rademacher(tuple(self.weight.shape), self.weight, rng)
                traces.append((signs * self.product(signs)).sum().detach())
        return Contributions(
            torch.stack(kappas)[:, None],
            torch.stack(traces)[:, None] if trace else None,
            f"probe(hessian in weight space, {probes})",
            False,
        )
