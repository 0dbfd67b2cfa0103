"""Second and third derivatives of batch and layer normalisation: cheap ones, and right ones.

**Second derivatives.** PyTorch composes the derivative of ``native_batch_norm_backward`` of some thirty elementwise
operations and reductions; on a CPU they take as long as half the convolutions of a ResNet. Here it is written out.

**Third derivatives** PyTorch 2.13 gets wrong, without a word, for both normalisations where the statistics depend on
the input, as it takes the saved ones for constants (pytorch/pytorch#186256 for batch, #175754 for layer
normalisation); 2.15 refuses them for batch normalisation. Here they are composed of elementary operations. Once the
oldest supported version computes them, ``composed`` and all that is for layer normalisation can go.

The nodes of PyTorch's own kernels, of cuDNN and of MIOpen save the same under other names (instance normalisation is
one of these too), and all are differentiated by PyTorch's own kernel here, on any device. ``SyncBatchNorm`` couples
the samples of all ranks and is refused (:meth:`relflat.estimate.subject.Subject`).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from relflat.capture.graph import ancestors
from relflat.curvature.written_out import WRITTEN_OUT, Gradients, Mended, gradients

Places = Sequence[Tensor] | Sequence[GradientEdge]
Hook = Callable[[Gradients, Gradients], Gradients | None]


@contextmanager
def norms_mended(of: Sequence[Tensor], at: Places, *, thrice: bool = False) -> Iterator[None]:
    """Within the block, gradients of ``of`` at ``at`` through normalisations can be differentiated again, rightly.

    Hooks on the nodes of the graph between the two give the numbers that the nodes found, with another graph
    behind them; they are gone after the block. Nodes that are not there (a compiled part, other kernels) stay as they
    are, and so do those of a checkpointed part, unless third derivatives are asked for (``thrice``): then each
    normalisation there costs one more recomputation of the part. Cost: one walk over that graph.
    """
    oldest = min((_age(x) for x in at), default=0)
    younger = ancestors([x.grad_fn for x in of], past=lambda node: node._sequence_nr() >= oldest)
    nodes = [n for n in younger if n.name() in _MENDED]  # a node is older than what is computed from it
    handles = [node.register_hook(_hook(node, _MENDED[node.name()], thrice)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _age(at: Tensor | GradientEdge) -> int:
    """When an endpoint was computed, in the counting of autograd; 0 for a leaf, which may have been used any time."""
    node = at.grad_fn if isinstance(at, Tensor) else at.node
    return 0 if node is None or not node.next_functions else node._sequence_nr()


def _in_a_pass_of_its_own(like: Tensor, read: Callable[[], Mended]) -> Mended:
    """Read saved tensors within another backward pass, as checkpointing hands them out once in each."""
    found, start = list[Mended](), like.new_zeros((), requires_grad=True)
    end = start.clone()
    assert end.grad_fn is not None
    end.grad_fn.register_prehook(lambda _: found.append(read()))
    torch.autograd.grad(end, start)
    return found[0]


def _hook(node: Any, norms: Sequence[Callable[[Any], Mended]], thrice: bool) -> Hook:
    """A hook that gives what came out of a node, in the order of its inputs, another graph."""

    def hook(found: Gradients, along: Gradients) -> Gradients | None:
        mended = list(found)
        for place, (given, norm) in enumerate(zip(found, norms, strict=False)):
            if given is None or along[0] is None or not given.requires_grad or given.is_sparse:
                continue
            try:
                read = norm(node)
            except RuntimeError:  # checkpointing hands out a tensor once
                if not thrice or norm not in (_BatchNorm, _LayerNorm):
                    continue
                read = _in_a_pass_of_its_own(given, functools.partial(norm, node))
            if type(read.x) is not Tensor or (norm is _Convolution and read.x.is_cpu):
                return None
            operands = given.detach(), along[0], read.x, read.weight
            mended[place] = _Mended.apply(*operands, read)  # type: ignore[no-untyped-call]  # nor has PyTorch
        return tuple(mended)

    return hook


class _Mended(torch.autograd.Function):
    """The value of G as it was found, with derivatives of our own."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, norm: Mended) -> Tensor:
        ctx.save_for_backward(found, grad, x, weight)
        ctx.norm = norm
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (found, *given), needs = ctx.saved_tensors, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():  # third derivatives may be asked for
            # endpoints of their own: x and gy may have been computed from each other
            given = [None if t is None else t.view_as(t) for t in given]
            return None, *gradients(ctx.norm.composed(*given), given, needs, v, True), None
        return None, *ctx.norm.once(v, found, given, needs), None


class _BatchNorm(Mended):
    """``G(gy, x, w) = w s (gy - mean(gy) - xh mean(gy xh))`` a channel, xh the normalised x, s its 1/std.

    In evaluation mode ``w s gy``.
    """

    def __init__(self, node: Any) -> None:
        self.x, self.weight = node._saved_input, node._saved_weight
        self.training = node._saved_training
        self.eps = node._saved_epsilon if hasattr(node, "_saved_epsilon") else node._saved_eps  # cuDNN's name, ours
        running = (node._saved_running_mean, node._saved_running_var)
        self.wide = torch.promote_types(self.x.dtype, torch.float32)  # sums in half precision lose too much
        self.running = [None if t is None else t.to(self.wide) for t in running]
        self.saved = [t.to(self.wide) for t in (node._saved_result1, node._saved_result2)]  # mean, 1/std

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        over, shape, narrow = [0, *range(2, x.ndim)], _along_channels(x), grad.dtype
        grad, x = grad.to(self.wide), x.to(self.wide)
        gain: Tensor | float = 1.0 if weight is None else weight.view(shape)
        if not self.training:
            assert self.running[1] is not None
            return (gain * (self.running[1] + self.eps).rsqrt().view(shape) * grad).to(narrow)
        centred = x - x.mean(over, keepdim=True)
        s = (centred.square().mean(over, keepdim=True) + self.eps).rsqrt()
        xh = s * centred
        spread = grad - grad.mean(over, keepdim=True) - xh * (grad * xh).mean(over, keepdim=True)
        return (gain * s * spread).to(narrow)

    def once(self, v: Tensor, found: Tensor, given: Sequence[Any], needs: Sequence[bool]) -> Gradients:
        """G is symmetric in gy, so its transpose is the same kernel once more, and what is left are sums a channel.

        With ``K = <v, gy> - sum(v) sum(gy) / M - <v, xh> <gy, xh> / M`` over the M numbers of a channel,

            in gy:  G(v)
            in w:   s K
            in x:   -s/M (<gy, xh> G(v) + <v, xh> G(gy) + w s K xh)
        """
        if not self.training:
            return super().once(v, found, given, needs)
        v, found, grad, x = (t.to(self.wide) for t in (v, found, *given[:2]))
        weight = None if given[2] is None else given[2].to(self.wide)
        shape, m, (mean, s) = _along_channels(x), x.numel() // x.shape[1], self.saved
        of_v, v_xh, v_sum = self._kernel(v, x, weight, [True, True, True])
        _, g_xh, g_sum = self._kernel(grad, x, weight, [False, True, True])
        k = (v * grad).sum([0, *range(2, x.ndim)])
        k = k.addcmul_(v_sum, g_sum, value=-1 / m).addcmul_(v_xh, g_xh, value=-1 / m)
        in_weight, share = s * k, s / -m
        slope = share * s * in_weight if weight is None else share * s * in_weight * weight  # xh = s (x - mean)
        in_x = torch.addcmul((slope * mean).neg_().view(shape), x, slope.view(shape))
        in_x.addcmul_(of_v, (share * g_xh).view(shape)).addcmul_(found, (share * v_xh).view(shape))
        return of_v, in_x, None if weight is None else in_weight

    def _kernel(self, grad: Tensor, x: Tensor, weight: Tensor | None, mask: list[bool]) -> Sequence[Tensor]:
        """PyTorch's gradients in input, weight and bias: G(grad), <grad, xh> and sum(grad) a channel."""
        options = (*self.running, *self.saved, self.training, self.eps, mask)
        found: Sequence[Tensor] = torch.ops.aten.native_batch_norm_backward(grad, x, weight, *options)
        return found


class _LayerNorm(Mended):
    """``G = s (g - mean(g) - xh mean(g xh))`` with ``g = w gy``, over the last dimensions."""

    def __init__(self, node: Any) -> None:
        self.x, self.weight = node._saved_input, node._saved_weight
        self.shape, self.mean, self.rstd = (node._saved_normalized_shape, node._saved_result1, node._saved_result2)

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        over, wide = tuple(range(-len(self.shape), 0)), self.rstd.dtype
        g, x = grad.to(wide), x.to(wide)
        g = g if weight is None else g * weight
        centred = x - x.mean(over, keepdim=True)
        variance = centred.square().mean(over, keepdim=True)
        # eps is not saved: it is what 1 / rstd^2 has over the variance of x
        eps = (self.rstd.reshape(variance.shape).pow(-2) - variance).detach()
        s = (variance + eps).rsqrt()
        xh = s * centred
        return (s * (g - g.mean(over, keepdim=True) - xh * (g * xh).mean(over, keepdim=True))).to(grad.dtype)

    def once(self, v: Tensor, found: Tensor, given: Sequence[Any], needs: Sequence[bool]) -> Gradients:
        """As for batch normalisation, a row at a time; ``K(v)`` is the gradient for a weight of 1.

        In gy ``w K(v)``, in w ``gy K(v)`` summed over rows, in x ``-s/M (<g, xh> K(v) + <v, xh> G + <v, G> xh)``.
        """
        wide, over = self.rstd.dtype, tuple(range(-len(self.shape), 0))
        v, found, grad, x = (t.to(wide) for t in (v, found, *given[:2]))
        weight = None if given[2] is None else given[2].to(wide)
        options = (self.shape, self.mean, self.rstd, None, None, [True, False, False])
        of_v: Tensor = torch.ops.aten.native_layer_norm_backward(v, x, *options)[0]
        g, xh = grad if weight is None else grad * weight, (x - self.mean).mul_(self.rstd)
        across = [(a * b).sum(over, keepdim=True) for a, b in ((g, xh), (v, xh), (v, found))]
        share = self.rstd / -math.prod(self.shape)
        in_x = xh.mul_(share * across[2]).addcmul_(of_v, share * across[0]).addcmul_(found, share * across[1])
        if weight is None:
            return of_v, in_x, None
        rows = tuple(range(x.ndim - len(self.shape)))
        return of_v * weight, in_x, (grad * of_v).sum(rows) if rows else grad * of_v


class _Convolution(Mended):
    """``G(gy, w)``, the gradient in the input; PyTorch takes that of ``<v, G>`` in w by a convolution with gy.

    Its kernel is as large as the picture then, which is slow where it is not on a CPU.
    """

    def __init__(self, node: Any) -> None:
        self.x, self.weight = node._saved_input, node._saved_weight
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        self.options = [getattr(node, f"_saved_{name}") for name in names]

    def composed(self, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        found: Tensor = _convolution_backward(grad, x, weight, None, *self.options, [True, False, False])[0]
        return found

    def once(self, v: Tensor, found: Tensor, given: Sequence[Any], needs: Sequence[bool]) -> Gradients:
        """In gy the convolution of v, in w the gradient that it has for the input v."""
        grad, _, weight = given
        in_grad = torch.ops.aten.convolution(v, weight, None, *self.options) if needs[0] else None
        mask = [False, True, False]
        in_weight = _convolution_backward(grad, v, weight, None, *self.options, mask)[1] if needs[2] else None
        return in_grad, None, in_weight


_convolution_backward = torch.ops.aten.convolution_backward


def _along_channels(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.ndim - 2)]


_MENDED: dict[str, Sequence[Callable[[Any], Mended]]] = {
    "NativeBatchNormBackward0": (_BatchNorm,),
    "CudnnBatchNormBackward0": (_BatchNorm,),
    "MiopenBatchNormBackward0": (_BatchNorm,),
    "NativeLayerNormBackward0": (_LayerNorm,),
    "ConvolutionBackward0": (_Convolution,),
    **WRITTEN_OUT,
}
"""By the name of a node, for each of its inputs what makes the gradient in it, as far as that is mended."""
