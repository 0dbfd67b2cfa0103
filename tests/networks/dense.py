"""Kappa from the definition, for whatever a network does: the dense Hessian row by row through autograd.

:mod:`relflat.reference` differentiates with torch.func, which many operations here do not allow (recurrent
kernels, in-place updates of buffers, checkpointing). So the Hessian is made by plain double backward, and
only the double sum of Definition 3 is the reference's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from relflat import reference

Run = Callable[[nn.Module], Any]


def layer_output(layer: Any, x: Tensor, V: Tensor) -> Tensor:
    """What a layer returns with V of shape (d, m) for its weight."""
    if hasattr(layer, "lora_A"):
        return F.linear(x, V, layer.base_layer.bias)
    if isinstance(layer, nn.Linear):
        return F.linear(x, V, layer.bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, V.mT, layer.padding_idx)
    shape = (V.shape[0], -1, *layer.kernel_size)
    return layer._conv_forward(x, V.reshape(shape), layer.bias)


def effective_weight(layer: Any) -> Tensor:
    """The weight of a layer as (d, m)."""
    for hook in layer._forward_pre_hooks.values():  # weight_norm of old computes it before each call
        hook(layer, None)
    if hasattr(layer, "lora_A"):
        return layer.base_layer.weight + sum(
            layer.scaling[a] * layer.lora_B[a].weight @ layer.lora_A[a].weight for a in layer.active_adapters
        )
    return layer.weight.mT if isinstance(layer, nn.Embedding) else layer.weight.flatten(1)


class Dense:
    """A model in which one layer's weight is a free matrix V in that layer alone.

    For the name of a parameter, V takes the place of the parameter wherever it is used.

    Args:
        model: the model, for this use only.
        layer: name of a module or of a parameter.
        run: ``model -> outputs``.
        weight: the present weight, if it is not the layer's own.
    """

    def __init__(self, model: nn.Module, layer: str, run: Run, weight: Tensor | None = None) -> None:
        self.model, self.run = with_elementary_norms(model), run
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if layer in parameters:
            self.parameter, self.name = parameters[layer], layer
            self.W = self.parameter.flatten(1)
        else:
            self.parameter, self.module = None, self.model.get_submodule(layer)
            self.W = effective_weight(self.module) if weight is None else weight

    def outputs(self, V: Tensor) -> Any:
        """The model's outputs as a function of the weight."""
        if self.parameter is not None:
            return _call_with(self.model, {self.name: V.reshape(self.parameter.shape)}, self.run)
        self.module.forward = lambda input: layer_output(self.module, input, V)
        return self.run(self.model)

    def kappa(self, loss_fn: Callable[[Any], Tensor]) -> Tensor:
        """Definition 3, differentiable in all parameters of ``self.model``."""
        V = self.W.clone() if self.W.requires_grad else self.W.clone().requires_grad_()
        H = hessian(loss_fn(self.outputs(V)).sum(), V)
        return reference.kappa_of_hessian(self.W, H.reshape(*V.shape, *V.shape))

    def kappa_ggn(self, loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with ``J' A J``."""
        V = self.W.clone() if self.W.requires_grad else self.W.clone().requires_grad_()
        z = self.outputs(V)
        J = jacobian(z, V)
        A = hessian(loss_fn(z).sum(), z)
        return reference.kappa_of_hessian(self.W, (J.T @ A.to(J.dtype) @ J).reshape(*V.shape, *V.shape))

    def gradients(self, kappa: Tensor) -> dict[str, Tensor]:
        """The gradient of a kappa in every parameter that wants one."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        found = grad(kappa, list(named.values()), materialize_grads=True)
        return dict(zip(named, found, strict=True))


def with_elementary_norms(model: nn.Module) -> nn.Module:
    """The model with normalisations of elementary operations, as PyTorch's kernels have wrong third derivatives."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            over = tuple(range(-len(module.normalized_shape), 0))
            module.forward = functools.partial(_normalised, module, over, 0)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = functools.partial(_batch_normalised, module)
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            module.forward = functools.partial(_instance_normalised, module)
    return model


def _batch_normalised(module: Any, x: Tensor) -> Tensor:
    if not module.training and module.track_running_stats:
        return type(module).forward(module, x)
    return _normalised(module, (0, *range(2, x.ndim)), x.ndim - 2, x)


def _instance_normalised(module: Any, x: Tensor) -> Tensor:
    return _normalised(module, tuple(range(2, x.ndim)), x.ndim - 2, x)


def _normalised(module: Any, over: tuple[int, ...], behind: int, x: Tensor) -> Tensor:
    centred = x - x.mean(over, keepdim=True)
    x = centred / (centred.square().mean(over, keepdim=True) + module.eps).sqrt()
    if module.weight is None:
        return x
    weight, bias = (t.reshape(*t.shape, *[1] * behind) for t in (module.weight, module.bias))
    return x * weight + bias


def jacobian(of: Tensor, at: Tensor) -> Tensor:
    """Rows of first derivatives, (of.numel(), at.numel()), with their graph."""
    rows = [grad(f, at, create_graph=True, materialize_grads=True)[0] for f in of.reshape(-1)]
    return torch.stack([row.to_dense().reshape(-1) for row in rows])


def hessian(loss: Tensor, at: Tensor) -> Tensor:
    """Second derivatives, (at.numel(), at.numel()), with their graph."""
    (slope,) = grad(loss, at, create_graph=True, materialize_grads=True)
    return jacobian(slope.to_dense(), at) if slope.requires_grad else at.new_zeros(at.numel(), at.numel())


def _call_with(model: nn.Module, replaced: dict[str, Tensor], run: Run) -> Any:
    class Seen:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return functional_call(model, replaced, args, kwargs)

    return run(Seen())  # type: ignore[arg-type]
