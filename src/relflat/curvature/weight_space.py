"""Kappa from derivatives in the weight itself (identity I4): needs nothing but the parameter.

For parameters whatever the network does with them (recurrent and attention projections, unknown classes of
layers), and for a layer that feeds itself, where a change of the weight also changes its later inputs. All
samples form one group: the same directions serve the whole batch, so the variance is that of Hutchinson's
estimator with one probe a batch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from relflat.capture.calls import Call
from relflat.capture.kinds import kind_of, weight_of
from relflat.curvature.operators import Operator, pull
from relflat.curvature.output_space import divisor
from relflat.errors import ConfigError, LayerError
from relflat.estimate.probes import Contributions, Gradient
from relflat.rng import Rng


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter seen as W of shape (d, m).

    Attributes:
        layer: name of the layer, for messages.
        parameter: the leaf tensor.
        view: from the parameter's shape to (d, m); moves entries only.
    """

    layer: str
    parameter: Tensor
    view: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: str, target: nn.Module | nn.Parameter) -> "Matrix":
        """The matrix of a tapped module or parameter.

        Raises:
            LayerError: if the module's weight is computed from other parameters.
        """
        if isinstance(target, nn.Parameter):
            return cls(layer, target, lambda w: w.flatten(1))
        kind, weight = kind_of(target), weight_of(target)
        assert kind is not None
        if not isinstance(weight, nn.Parameter) or hasattr(target, "lora_A"):
            raise LayerError(
                f"the weight of layer {layer!r} is computed from other parameters (parametrization, adapter), so it "
                "cannot be changed or differentiated as a whole; name one of those parameters instead"
            )
        return cls(layer, weight, lambda w: kind.matrix(target, w))

    def weight(self) -> Float[Tensor, "d m"]:
        """W itself."""
        return self.view(self.parameter)

    def back(self, direction: Float[Tensor, "d m"]) -> Tensor:
        """A direction in the shape and type of the parameter: the inverse of ``view``."""
        blank = torch.zeros_like(self.parameter, requires_grad=True)
        with torch.enable_grad():
            (moved,) = torch.autograd.grad(
                self.view(blank), blank, direction.to(blank.dtype), create_graph=direction.requires_grad
            )
        return moved

    def as_call(self) -> Call:
        """The parameter in the place of a layer's output, as an endpoint of differentiation."""
        if hasattr(self.parameter, "full_tensor"):
            raise LayerError(
                f"the curvature of layer {self.layer!r} is taken in its weight, and that is sharded (FSDP); name a "
                "dense or convolutional layer that the network calls, whose curvature is taken in its output"
            )
        if not self.parameter.requires_grad:
            raise LayerError(
                f"the curvature of layer {self.layer!r} is taken in its weight, and that is frozen "
                "(requires_grad=False); unfreeze it while FAM or the measurement runs"
            )
        p: Any = self.parameter
        return Call(self.layer, None, None, p, p, p, get_gradient_edge(p), (0, 0))  # type: ignore[arg-type]


class WeightSpace:
    """Quadratic forms of a curvature in one weight, and kappa made of them.

    Args:
        matrix: the weight.
        scale: feature scales of ``normalize_features``, 0 for features that are left out; or None.
        adaptive: the adaptive form.
        gradient: ``"full"`` or ``"weights"``.
        create_graph: whether products must be differentiable.
    """

    def __init__(
        self,
        matrix: Matrix,
        *,
        scale: Float[Tensor, " m"] | None,
        adaptive: bool,
        gradient: Gradient,
        create_graph: bool,
    ) -> None:
        if gradient == "frozen":
            raise ConfigError(
                f"gradient='frozen' keeps the gradient through the features, and those of layer {matrix.layer!r} are "
                "not seen as its curvature is taken in its weight; use gradient='full' or 'weights'"
            )
        self.matrix, self.adaptive, self.gradient, self.create_graph = (
            matrix,
            adaptive,
            gradient,
            create_graph,
        )
        self.call = matrix.as_call()
        flat = matrix.view(matrix.parameter)
        wide = torch.promote_types(flat.dtype, torch.float32)
        self.scale = torch.ones((), dtype=wide, device=flat.device) if scale is None else scale.to(wide)
        self.divisor = divisor(self.scale)
        self.weight: Float[Tensor, "d m"] = flat.to(wide) * self.scale

    def _seen(self, gradient: Tensor) -> Float[Tensor, "d m"]:
        return self.matrix.view(gradient).to(self.weight.dtype) / self.divisor

    def product(self, operator: Operator, direction: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        """``H V``, in scaled features if there are scales."""
        return self._seen(operator([self.matrix.back(direction / self.divisor)])[0])

    def _quadratic(self, operator: Operator, direction: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
        if self.gradient == "full":
            return (direction * self.product(operator, direction)).sum()
        linear = (direction * self.product(operator, direction.detach()).detach()).sum()
        return 2 * linear - linear.detach()

    def products_for_exact(self, *, trace: bool) -> int:
        """How many products :meth:`exact` takes."""
        d, m = self.weight.shape
        return d * m if trace or not self.adaptive else m

    def exact(self, operator: Operator, *, trace: bool) -> Contributions:
        """``sum_{t,j} ((W W') e_j)' (H e_j e_t')_t``: one product for each entry of the weight."""
        d, m = self.weight.shape
        total, diagonal = self.weight.new_zeros(()), self.weight.new_zeros(())
        if self.adaptive:
            for t in range(m):
                column = torch.zeros_like(self.weight)
                column[:, t] = 1
                total = total + self._quadratic(operator, self.weight * column)
        gram = self.weight @ self.weight.mT
        for j in range(d if trace or not self.adaptive else 0):
            for t in range(m):
                basis = torch.zeros_like(self.weight)
                basis[j, t] = 1
                curved = self.product(operator, basis)
                diagonal = diagonal + curved[j, t].detach()
                if not self.adaptive:
                    curved = curved if self.gradient == "full" else curved.detach()
                    total = total + gram[j] @ curved[:, t]
        around = diagonal.reshape(1, 1) if trace else None
        return Contributions(total.reshape(1, 1), around, "exact(weight)", True)

    def sampled(self, operator: Operator, *, probes: int, trace: bool, rng: Rng, name: str) -> Contributions:
        """``<W R, H W R>`` with R of independent signs, diagonal if adaptive."""
        kappas, traces = [], []
        for _ in range(probes):
            kappas.append(self._quadratic(operator, random_direction(self.weight, self.adaptive, rng)))
            if trace:
                signs = rng.signs(tuple(self.weight.shape), self.weight)
                traces.append((signs * self.product(operator, signs)).sum().detach())
        around = torch.stack(traces)[:, None] if trace else None
        return Contributions(
            torch.stack(kappas)[:, None], around, f"probe({name} in weight, {probes})", False
        )

    def ggn_factored(self, outputs: Tensor, factors: Iterable[Tensor], *, trace: bool) -> Contributions:
        """I7: ``||W' G||_F^2`` with ``G`` the gradient in the weight of ``<r, outputs>``, r as in probes."""
        kappas, traces = [], []
        for r in factors:
            g = self._seen(pull([outputs], [self.call], [r], create_graph=self.create_graph)[0])
            shares = (self.weight * g).sum(0) if self.adaptive else self.weight.mT @ g
            kappas.append(shares.square().sum())
            traces.append(g.detach().square().sum())
        around = torch.stack(traces)[:, None] if trace else None
        return Contributions(
            torch.stack(kappas)[:, None], around, f"probe(ggn in weight, {len(kappas)})", False
        )


def random_direction(weight: Float[Tensor, "d m"], adaptive: bool, rng: Rng) -> Float[Tensor, "d m"]:
    """``W R``, R a matrix of independent signs, or a diagonal one."""
    m = weight.shape[1]
    return weight * rng.signs((m,), weight) if adaptive else weight @ rng.signs((m, m), weight)
