"""Second and third derivatives of batch and layer normalisation: cheap ones, and right ones.

**Second derivatives.** PyTorch composes the derivative of ``native_batch_norm_backward`` of some thirty elementwise
operations and reductions; on a CPU they take as long as half the convolutions of a ResNet. Here it is written out:
the map from the gradient of the outputs to that of the inputs is symmetric, so its transpose is the same kernel once
more, and what is left are five sums a channel.

**Third derivatives** PyTorch 2.13 gets wrong, without a word, for both normalisations where the statistics depend on
the input, as it takes the saved ones for constants (pytorch/pytorch#186256 for batch, #175754 for layer
normalisation). Here they are composed of elementary operations. No version is known that computes them; once the
oldest supported one does, ``_composed`` and all that is for layer normalisation can go. Versions that refuse them
(proposed in #186779 and #176234) do not end the need.

**Not covered:** batch normalisation on anything but a CPU. On a GPU its nodes (``NativeBatchNormBackward0`` and
cuDNN's ``CudnnBatchNormBackward0``) keep PyTorch's derivatives: second ones right and slow, third ones wrong in
training mode, and with them the gradient of any penalty that needs them for a layer before such a normalisation:
``gradient="full"`` with ``curvature="hessian"`` or ``method="exact"``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Gradients = tuple[Tensor | None, ...]

_ONLY_INPUT, _ONLY_SUMS, _ALL = [True, False, False], [False, True, True], [True, True, True]
_batch_backward = torch.ops.aten.native_batch_norm_backward
_layer_backward = torch.ops.aten.native_layer_norm_backward


@contextmanager
def norms_mended(of: Sequence[Tensor], at: Sequence[Tensor] | Sequence[GradientEdge]) -> Iterator[None]:
    """Within the block, gradients of ``of`` at ``at`` through normalisations can be differentiated again, rightly.

    Hooks on the nodes of the graph between the two give the numbers that the nodes found, with another graph
    behind them; they are gone after the block. Nodes that are not there (a compiled part, other kernels) or whose
    saved tensors can be had only once (checkpointing) stay as they are. Cost: one walk over that graph.
    """
    oldest = min((_age(x) for x in at), default=0)
    nodes = [n for n in _younger(of, oldest) if n.name() in _MENDED]
    handles = [node.register_hook(_MENDED[node.name()](node)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _age(at: Tensor | GradientEdge) -> int:
    """When an endpoint was computed, in the counting of autograd; 0 for a leaf, which may have been used any time."""
    node = at.grad_fn if isinstance(at, Tensor) else at.node
    return 0 if node is None or not node.next_functions else node._sequence_nr()


def _younger(of: Sequence[Tensor], oldest: int) -> Iterator[Node]:
    """Nodes that the tensors come from and that are no older; a node is older than what is computed from it."""
    stack: list[Node | None] = [x.grad_fn for x in of]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or node._sequence_nr() < oldest:
            continue
        yield node
        new = {parent for parent, _ in node.next_functions} - seen
        seen |= new
        stack += new


def _hook(
    node: Any, function: type[torch.autograd.Function], read: Callable[[Any], tuple[Any, ...] | None]
) -> Callable[[Gradients, Gradients], Gradients | None]:
    """A hook that replaces the node's gradient in its input by ``function``, of the same value.

    ``read`` gives input, weight and constants that the node saved, or None if the node is to stay as it is.
    """

    def hook(
        found: Gradients, along: Gradients
    ) -> Gradients | None:  # what came out of the node, what went in
        if found[0] is None or along[0] is None or not found[0].requires_grad:
            return None
        try:
            saved = read(node)
        except RuntimeError:  # checkpointing hands out a tensor once
            return None
        if saved is None or type(saved[0]) is not Tensor:
            return None
        mended = function.apply(found[0].detach(), along[0], *saved)  # type: ignore[no-untyped-call]
        return (mended, *found[1:])

    return hook


# Batch normalisation


def _batch_norm(node: Any) -> Callable[[Gradients, Gradients], Gradients | None]:
    return _hook(node, _InputGradient, _Constants.read)


@dataclass(frozen=True, eq=False)
class _Constants:
    """What a node saved beside its input and weight; no gradient goes there."""

    training: bool
    eps: float
    running: tuple[Tensor | None, Tensor | None]  # mean and variance, for evaluation mode
    saved: tuple[Tensor, Tensor]  # mean and 1/std of the batch

    @classmethod
    def read(cls, node: Any) -> "tuple[Tensor, Tensor | None, _Constants] | None":
        """Input, weight and constants of a node, unless it computes on something other than a CPU."""
        x, weight = node._saved_input, node._saved_weight
        if x.device.type != "cpu":
            return None
        running = (node._saved_running_mean, node._saved_running_var)
        saved = (node._saved_result1, node._saved_result2)
        return x, weight, cls(node._saved_training, node._saved_eps, running, saved)

    @property
    def running_scale(self) -> Tensor:
        """1/std of evaluation mode."""
        var = self.running[1]
        assert var is not None
        return (var + self.eps).rsqrt()

    def to(self, dtype: torch.dtype) -> "_Constants":
        """The same in another precision."""
        mean, var = (None if t is None else t.to(dtype) for t in self.running)
        return replace(self, running=(mean, var), saved=(self.saved[0].to(dtype), self.saved[1].to(dtype)))

    def pull(self, grad: Tensor, x: Tensor, weight: Tensor | None, mask: list[bool]) -> Sequence[Tensor]:
        """Gradients in input, weight and bias by PyTorch's kernel: G(grad), <grad, xh> and sum(grad) a channel."""
        options = (self.training, self.eps, mask)
        found: Sequence[Tensor] = _batch_backward(grad, x, weight, *self.running, *self.saved, *options)
        return found


class _InputGradient(torch.autograd.Function):
    """``G(gy, x, w) = w s (gy - mean(gy) - xh mean(gy xh))`` a channel, xh the normalised x, s its 1/std.

    In evaluation mode ``w s gy``. The value comes in as ``found``; the backward gives the derivatives of ``<v, G>``:
    with ``K = <v, gy> - sum(v) sum(gy) / M - <v, xh> <gy, xh> / M`` over the M numbers of a channel,

        in gy:  G(v)
        in w:   s K
        in x:   -s/M (<gy, xh> G(v) + <v, xh> G(gy) + w s K xh)
    """

    @staticmethod
    def forward(
        ctx: Any, found: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, constants: _Constants
    ) -> Tensor:
        ctx.save_for_backward(found, grad, x, weight)
        ctx.constants = constants
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        found, grad, x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # third derivatives may be asked for
            given = grad, x, weight = grad.view_as(grad), x.view_as(x), _alias(weight, True)
            value = _composed(grad, x, weight, ctx.constants)
            return None, *_gradients(value, given, ctx.needs_input_grad[1:4], v, True), None
        wide = torch.promote_types(x.dtype, torch.float32)  # sums in half precision lose too much
        v, found, grad, x = (t.to(wide) for t in (v, found, grad, x))
        scale = None if weight is None else weight.to(wide)
        constants, in_x = ctx.constants.to(wide), None
        if constants.training:
            in_grad, in_x, in_scale = _batch(v, found, grad, x, scale, constants)
        else:
            in_grad, in_scale = _running(v, grad, x, scale, constants)
        return None, in_grad, in_x, None if weight is None else in_scale, None


def _composed(grad: Tensor, x: Tensor, weight: Tensor | None, constants: _Constants) -> Tensor:
    """G from elementary operations, differentiable as often as one likes."""
    over, shape = [0, *range(2, x.ndim)], _along_channels(x)
    gain: Tensor | float = 1.0 if weight is None else weight.view(shape)
    if not constants.training:
        return gain * constants.running_scale.view(shape) * grad
    centred = x - x.mean(over, keepdim=True)
    s = (centred.square().mean(over, keepdim=True) + constants.eps).rsqrt()
    xh = s * centred
    return gain * s * (grad - grad.mean(over, keepdim=True) - xh * (grad * xh).mean(over, keepdim=True))


def _batch(
    v: Tensor, found: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, constants: _Constants
) -> tuple[Tensor, Tensor, Tensor]:
    """Those in gy, x and w with statistics of the batch: two kernels, one product and its sum, and three passes."""
    shape, m = _along_channels(x), x.numel() // x.shape[1]
    of_v, v_xh, v_sum = constants.pull(v, x, weight, _ALL)
    _, g_xh, g_sum = constants.pull(grad, x, weight, _ONLY_SUMS)
    mean, s = constants.saved
    k = _sums(v, grad) - (v_sum * g_sum + v_xh * g_xh) / m  # K
    gain = s if weight is None else s * weight  # w s
    # -s/M w s K xh = slope (x - mean) with xh = s (x - mean); then -s/M <gy, xh> G(v), and -s/M <v, xh> G(gy)
    slope = -s * s * gain * k / m
    in_x = torch.addcmul((-slope * mean).view(shape), x, slope.view(shape))
    in_x.addcmul_(of_v, (-s * g_xh / m).view(shape)).addcmul_(found, (-s * v_xh / m).view(shape))
    return of_v, in_x, s * k


def _running(
    v: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, constants: _Constants
) -> tuple[Tensor, Tensor]:
    """Those in gy and w with running statistics: ``G = w s gy``, in which x has no part."""
    (in_grad, *_) = constants.pull(v, x, weight, _ONLY_INPUT)
    return in_grad, constants.running_scale * _sums(v, grad)


def _along_channels(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.ndim - 2)]


def _sums(a: Float[Tensor, "n c *s"], b: Float[Tensor, "n c *s"]) -> Float[Tensor, " c"]:
    return (a * b).sum([0, *range(2, a.ndim)])


# Layer normalisation


def _layer_norm(node: Any) -> Callable[[Gradients, Gradients], Gradients | None]:
    return _hook(node, _LayerInputGradient, _read_layer_norm)


def _read_layer_norm(node: Any) -> tuple[Any, ...]:
    constants = (node._saved_normalized_shape, node._saved_result1, node._saved_result2, node._saved_bias)
    return node._saved_input, node._saved_weight, constants


class _LayerInputGradient(torch.autograd.Function):
    """The gradient in the input of a layer normalisation: PyTorch's own up to second derivatives, then composed."""

    @staticmethod
    def forward(
        ctx: Any, found: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, constants: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(grad, x, weight)
        ctx.constants = constants
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        further = torch.is_grad_enabled()  # third derivatives may be asked for
        shape, mean, rstd, bias = ctx.constants
        with torch.enable_grad():
            grad, x, weight = given = [_alias(t, further) for t in ctx.saved_tensors]
            assert grad is not None
            assert x is not None
            if further:
                value = _layer_composed(grad, x, weight, rstd, len(shape))
            else:
                value = _layer_backward(grad, x, shape, mean, rstd, weight, bias, _ONLY_INPUT)[0]
            return None, *_gradients(value, given, ctx.needs_input_grad[1:4], v, further), None


def _layer_composed(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int) -> Tensor:
    """``s (g - mean(g) - xh mean(g xh))`` with ``g = w gy``, over the last ``dims`` dimensions.

    eps is not saved: it is what ``1 / rstd^2`` has over the variance of x.
    """
    over, wide = tuple(range(-dims, 0)), rstd.dtype
    g, x = grad.to(wide), x.to(wide)
    g = g if weight is None else g * weight
    centred = x - x.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    eps = (rstd.reshape(variance.shape).pow(-2) - variance).detach()
    s = (variance + eps).rsqrt()
    xh = s * centred
    return (s * (g - g.mean(over, keepdim=True) - xh * (g * xh).mean(over, keepdim=True))).to(grad.dtype)


# Both


def _gradients(
    value: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool], v: Tensor, further: bool
) -> list[Tensor | None]:
    """Those of ``<v, value>`` in what is given and needed, None elsewhere."""
    wanted = [t for t, need in zip(given, needs, strict=True) if need and t is not None]
    pulled = iter(torch.autograd.grad(value, wanted, v, create_graph=further, allow_unused=True))
    return [next(pulled) if need and t is not None else None for t, need in zip(given, needs, strict=True)]


def _alias(t: Tensor | None, further: bool) -> Tensor | None:
    """One of several tensors that may have been computed from each other, as an endpoint of its own."""
    if t is None:
        return None
    return t.view_as(t) if further else t.detach().requires_grad_(t.requires_grad)


_MENDED = {"NativeBatchNormBackward0": _batch_norm, "NativeLayerNormBackward0": _layer_norm}
