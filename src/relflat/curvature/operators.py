"""Products with the curvature of the loss after a layer, by automatic differentiation of the tail alone.

A direction lives in the output space of the tapped calls (identity I5): nothing here differentiates through
the layer's weight or the trunk before it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from relflat.capture.calls import Call
from relflat.capture.graph import ancestors
from relflat.curvature.torch_norms import Places, norms_mended
from relflat.errors import GraphError, LossError, SecondDerivativeError

Direction = Sequence[Tensor]
Curve = Direction | Callable[[Tensor], Tensor]
MISSING = ("Error", "torch::autograd::Error", "torch::autograd::NotImplemented")
"""Nodes in the place of derivatives that there are not."""


class HessianOperator:
    """``v -> (d2 L / dz2) v``. Setting up costs one backward of the tail, each product two more.

    Args:
        of: the loss; or the outputs, where ``slope`` is the gradient of the loss in them.
        calls: where it is taken.
        slope: to be given where autograd cannot differentiate the loss twice.
        create_graph: whether products are to be differentiated again.
    """

    def __init__(self, of: Tensor, calls: Sequence[Call], slope: Tensor | None = None, *, create_graph: bool) -> None:
        self.calls, self.create_graph = calls, create_graph
        self.gradient = pull([of], calls, None if slope is None else [slope], create_graph=1 + create_graph)
        _check_no_dead_end(self.gradient, calls)
        if not any(g.requires_grad for g in self.gradient):
            raise LossError(
                f"the gradient of the loss does not change with the output of layer {calls[0].layer!r}: its "
                "Hessian is zero wherever it exists, as for a hinge or absolute error; use a smooth loss, or "
                "FAM(..., radius=...), which needs no Hessian"
            )

    def __call__(self, v: Direction) -> list[Tensor]:
        """The product: ``grad(g, z, grad_outputs=v)``, right also where v depends on the parameters."""
        return pull(self.gradient, self.calls, v, create_graph=self.create_graph, required=False)

    def slope_at_calls(self) -> list[Tensor]:
        """The gradient the operator started from."""
        return [g.detach() for g in self.gradient]


class GGNOperator:
    """``v -> J' A J v``, J the Jacobian of the outputs and A the Hessian of the loss with respect to all of them.

    ``J v`` by differentiating the vector-Jacobian product in its vector. Each product costs four backward
    passes of the tail, and one of the loss where its Hessian is not known.

    Args:
        outputs: what the loss was computed from.
        curve: ``A v``, of one tensor; or the gradient of the loss in the outputs, to be differentiated.
        calls: where it is taken.
        create_graph: whether products are to be differentiated again.
    """

    def __init__(self, outputs: Sequence[Tensor], curve: Curve, calls: Sequence[Call], *, create_graph: bool) -> None:
        self.calls, self.create_graph, self.outputs, self.curve = calls, create_graph, outputs, curve
        if not callable(curve) and not any(c.requires_grad for c in curve):
            raise LossError(
                "the gradient of the loss does not change with the model's outputs: its Gauss-Newton matrix is "
                "zero, as for a hinge or absolute error; use a smooth loss, or FAM(..., radius=...)"
            )
        # not 0, where some derivatives (of norms, of logcumsumexp) are not right or not numbers
        self.dual = [torch.ones_like(z, requires_grad=True) for z in outputs]
        self.pullback = pull(outputs, calls, self.dual, create_graph=1 + create_graph)
        _check_no_dead_end([*self.pullback, *(() if callable(curve) else curve)], calls)

    def __call__(self, v: Direction) -> list[Tensor]:
        """The product: push ``v`` forward, curve it, pull it back."""
        pushed = self._back(self.pullback, self.dual, v)
        curved = [self.curve(*pushed)] if callable(self.curve) else self._back(self.curve, self.outputs, pushed)
        return pull(self.outputs, self.calls, curved, create_graph=self.create_graph, required=False)

    def slope_at_calls(self) -> list[Tensor]:
        """The gradient, by one pull-back; none where A is known."""
        if callable(self.curve):
            return []
        along = [c.detach() for c in self.curve]
        return pull(self.outputs, self.calls, along, create_graph=False, required=False)

    def _back(self, of: Sequence[Tensor], at: Sequence[Tensor], v: Direction) -> list[Tensor]:
        found = differentiate(of, at, v, create_graph=self.create_graph)
        return [torch.zeros_like(z) if g is None else g for g, z in zip(found, at, strict=True)]


Operator = HessianOperator | GGNOperator
"""A symmetric linear map on directions, one tensor a call; and the gradient of the loss in the calls' outputs."""


def slope_in(outputs: Sequence[Tensor], loss: Tensor) -> list[Tensor]:
    """The gradient of the loss in the outputs, with a graph."""
    found = differentiate([loss], outputs, None, create_graph=True)
    if all(g is None for g in found):
        raise GraphError(
            "the loss was not computed from the model's outputs, so there is no Gauss-Newton matrix; "
            "use curvature='hessian'"
        )
    return [torch.zeros_like(z) if g is None else g for g, z in zip(found, outputs, strict=True)]


def pull(
    of: Sequence[Tensor], calls: Sequence[Call], along: Direction | None, *, create_graph: int, required: bool = True
) -> list[Tensor]:
    """Gradients with respect to the calls' outputs, zero where there is no dependence; some is ``required``."""
    edges = [_edge(c) for c in calls]
    found = differentiate(of, edges, along, create_graph=create_graph)
    if required and all(g is None for g in found):
        raise GraphError(
            f"the loss does not depend on the output of layer {calls[0].layer!r} in the last forward pass of the "
            "model; give the criterion the outputs of that very pass, not detached, not of another model and not "
            "through quantised layers, which have no derivative"
        )
    for g, c in zip(found, calls, strict=True):
        if g is not None and g.layout != torch.strided:
            raise GraphError(
                f"the gradient in parameter {c.layer!r} is sparse and cannot be differentiated again; name the "
                "module in place of its parameter, or build nn.Embedding with sparse=False"
            )
    return [
        torch.zeros_like(c.output) if g is None else g.reshape(c.output.shape)  # that of what an output views
        for g, c in zip(found, calls, strict=True)
    ]


def _edge(call: Call) -> GradientEdge:
    """Where the graph passes the call's output."""
    if call.edge is None:
        raise GraphError(
            f"layer {call.layer!r} ran under torch.no_grad() inside a training forward pass, so its curvature "
            "cannot be differentiated; with gradient checkpointing use use_reentrant=False, for validation "
            "use model.eval()"
        )
    return call.edge


def differentiate(
    of: Sequence[Tensor], at: Places, along: Direction | None, *, create_graph: int
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` that keeps the graph and says which operation has no second derivative.

    What of ``of`` is constant has no part in products along a direction. ``create_graph`` says how often the result
    is to be differentiated again: 0, 1, 2.
    """
    if along is not None:
        live = [(f, v) for f, v in zip(of, along, strict=True) if f.requires_grad]
        if not live:
            return [None] * len(at)
        of, along = [f for f, _ in live], [v for _, v in live]
    try:
        with norms_mended(of, at, thrice=create_graph > 1) if create_graph else nullcontext():
            return torch.autograd.grad(of, at, along, True, create_graph > 0, allow_unused=True)
    except RuntimeError as error:
        raise _explained(error) from error


def _check_no_dead_end(gradients: Sequence[Tensor], calls: Sequence[Call]) -> None:
    """Refuse gradients through ``once_differentiable`` operations: autograd takes them for constants there."""
    trunk = [c.edge.node for c in calls if c.edge is not None]
    for node in ancestors([g.grad_fn for g in gradients], trunk):
        if node.name() in MISSING[:2]:
            raise _explained(_error_of(node))


def _error_of(node: Any) -> RuntimeError:
    """What the node would say if it were reached; it takes as many tensors as its operation has outputs."""
    for count in range(1, 9):
        try:
            node(*[torch.zeros(())] * count)
        except TypeError:
            continue
        except RuntimeError as error:
            return error
    return RuntimeError("derivative is not implemented")


def _explained(error: RuntimeError) -> Exception:
    text = str(error).splitlines()[0]
    if "margin_loss_backward" in text:
        return LossError(
            f"PyTorch has no second derivative of a margin loss ({text}); a hinge's is zero wherever it exists. Use "
            "a smooth loss, or FAM(..., radius=...)"
        )
    markers = ("is not implemented", "once_differentiable", "support double backward", "donated buffers")
    if any(m in text for m in markers):
        return SecondDerivativeError(f"an operation after the layer cannot be differentiated twice ({text})")
    return error
