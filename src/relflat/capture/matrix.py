"""A parameter seen as the matrix W of shape (d, m)."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from relflat.capture.calls import Call
from relflat.capture.kinds import Kind, kind_of, weight_of
from relflat.capture.uses import View, as_stored
from relflat.errors import LayerError


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter seen as W of shape (d, m), or as a stack of such, by ``view``, which moves entries only."""

    layer: str
    parameter: Tensor
    view: View

    @classmethod
    def of(cls, layer: str, target: nn.Module | nn.Parameter, view: View = as_stored) -> "Matrix":
        """The matrix of a tapped module, or parameter by a view of it."""
        if isinstance(target, nn.Parameter):
            return cls(layer, target, view)
        kind, weight = cast(Kind, kind_of(target)), weight_of(target)
        whole = weight._base if weight._is_view() else weight  # a weight may be a view of a parameter (Keras)
        if not isinstance(whole, nn.Parameter) or whole.numel() != weight.numel() or hasattr(target, "lora_A"):
            raise LayerError(
                f"the weight of layer {layer!r} is computed from other parameters (parametrization, adapter), so it "
                "cannot be changed or differentiated as a whole, which is needed as the loss depends on it in other "
                "ways than by the layer's outputs, or all of its uses count; name one of those parameters instead"
            )
        as_weight = (weight.shape, weight.stride())
        return cls(layer, whole, lambda w: kind.matrix(target, w if whole is weight else w.as_strided(*as_weight)))

    def weight(self) -> Float[Tensor, "*s d m"]:
        """W itself."""
        return self.view(self.parameter)

    def back(self, direction: Float[Tensor, "*s d m"]) -> Tensor:
        """A direction in the shape and type of the parameter: the inverse of ``view``, which is its transpose."""
        blank, graph = torch.zeros_like(self.parameter, requires_grad=True), direction.requires_grad
        with torch.enable_grad():
            view = self.view(blank)
            (moved,) = torch.autograd.grad(view, blank, direction.to(blank.dtype), create_graph=graph)
        return moved

    def as_call(self) -> Call:
        """The parameter in the place of a layer's output, as an endpoint of differentiation."""
        problem = None
        if hasattr(self.parameter, "full_tensor"):
            problem = (
                "sharded (FSDP); name a dense or convolutional layer that the network calls, whose curvature is "
                "taken in its output"
            )
        elif not self.parameter.requires_grad:
            problem = "frozen (requires_grad=False); unfreeze it while FAM or the measurement runs"
        if problem:
            raise LayerError(f"the curvature of layer {self.layer!r} is taken in its weight, and that is {problem}")
        p: Any = self.parameter
        return Call(self.layer, None, None, p, p, p, get_gradient_edge(p), (0, 0))  # type: ignore[arg-type]
