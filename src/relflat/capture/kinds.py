"""The classes of layer whose weight acts linearly: how each sees its input, output and weight as rows.

At every position (sample, token, pixel) such a layer computes ``z = W phi + b``. A :class:`Kind` says what
phi, W and the positions are. To add a class of layer, write one and :func:`register` it. Modules of other
classes, and bare parameters, are handled through their weight alone (:mod:`relflat.curvature.weight_space`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """How a class of layer acts linearly.

    Channel groups c (grouped convolutions, else one) split the outputs evenly; each has features of its own.

    Attributes:
        matches: whether a module is of this kind.
        matrix: ``(module, weight) -> (d, m)``, the weight as W. May not copy.
        features: ``(module, input) -> (n, t, c, m)``, phi at every sample, position and group.
        project: ``(module, input, b) -> (n, t, c, q)`` with ``b`` of shape (n, q, m): ``b . phi`` without
            forming phi.
        outputs_last: ``(module, output) -> (n, ..., d)``, a view.
        outputs_back: undoes ``outputs_last``.
    """

    matches: Callable[[nn.Module], bool]
    matrix: Callable[[Any, Tensor], Tensor]
    features: Callable[[Any, Tensor], Tensor]
    project: Callable[[Any, Tensor, Tensor], Tensor]
    outputs_last: Callable[[Any, Tensor], Tensor]
    outputs_back: Callable[[Any, Tensor], Tensor]


_KINDS: list[Kind] = []


def register(kind: Kind) -> Kind:
    """Add a class of layer; asked before those that are there already.

    Example:
        >>> from torch import nn
        >>> class Transposed(nn.Module):
        ...     "A dense layer whose weight is stored as (m, d)."
        >>> linear = kind_of(nn.Linear(2, 3))
        >>> kind = Kind(
        ...     matches=lambda module: isinstance(module, Transposed),
        ...     matrix=lambda module, weight: weight.mT,
        ...     features=linear.features,
        ...     project=linear.project,
        ...     outputs_last=lambda module, z: z,
        ...     outputs_back=lambda module, z: z,
        ... )
        >>> register(kind) is kind_of(Transposed())
        True
    """
    _KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None."""
    return next((k for k in _KINDS if k.matches(module)), None)


def weight_of(module: Any) -> Tensor:
    """The weight tensor of a module of a known kind."""
    return getattr(module, "base_layer", module).weight


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters the weight is made of: itself, or what its parametrization starts from."""
    named = getattr(module, "base_layer", module).named_parameters()
    return [p for name, p in named if name == "weight" or name.startswith("parametrizations.weight.")]


def _same(module: nn.Module, z: Tensor) -> Tensor:
    return z


def _runs(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Match modules that run the forward of one of the classes, not one of their own."""
    return lambda module: any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


# -- dense layers ------------------------------------------------------------------------------------------


def _dense_features(module: nn.Module, x: Float[Tensor, "... m"]) -> Float[Tensor, "n t 1 m"]:
    if x.ndim == 1:
        return x[None, None, None]
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), 1, x.shape[-1])


def _dense_project(module: nn.Module, x: Tensor, b: Float[Tensor, "n q m"]) -> Float[Tensor, "n t 1 q"]:
    return (_dense_features(module, x).squeeze(2) @ b.mT).unsqueeze(2)


_LINEAR = Kind(
    _runs(nn.Linear),
    lambda module, w: w,
    _dense_features,
    _dense_project,
    outputs_last=_same,
    outputs_back=_same,
)

# Conv1D of GPT-2 (transformers), a dense layer whose weight is stored as (m, d).
_TRANSPOSED_LINEAR = Kind(
    lambda module: type(module).__name__ == "Conv1D" and hasattr(module, "nf"),
    lambda module, w: w.mT,
    _dense_features,
    _dense_project,
    outputs_last=_same,
    outputs_back=_same,
)


# -- low-rank adaptation -------------------------------------------------------------------------------------


def _lora_matrix(module: Any, w: Tensor) -> Float[Tensor, "d m"]:
    """Effective weight of a dense layer wrapped by ``peft``: frozen base plus trainable factors.

    Adapters that are switched off, or merged into the base, add nothing.
    """
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return w
    for name in module.active_adapters:
        if name in module.lora_A:
            w = w + module.scaling[name] * (module.lora_B[name].weight @ module.lora_A[name].weight)
    return w


def dropping_adapter(module: nn.Module) -> str | None:
    """An adapter whose input is not that of its base layer, as dropout is active on it; None if there is none."""
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    found: dict[str, Any] = dict(getattr(module, "lora_dropout", {}))
    active = [n for n in getattr(module, "active_adapters", ()) if n in found]
    return next((n for n in active if found[n].training and getattr(found[n], "p", 0.0) > 0), None)


_LORA = Kind(
    lambda module: (
        hasattr(module, "lora_A")
        and isinstance(getattr(module, "base_layer", None), nn.Linear)
        and not getattr(module, "lora_magnitude_vector", None)  # DoRA has another effective weight
    ),
    _lora_matrix,
    _dense_features,
    _dense_project,
    outputs_last=_same,
    outputs_back=_same,
)


# -- lookup tables -------------------------------------------------------------------------------------------


def _embedding_features(module: nn.Embedding, ids: Tensor) -> Float[Tensor, "n t 1 m"]:
    """One-hot rows; zero at the padding index, which the layer treats as a constant."""
    hot = F.one_hot(ids, module.num_embeddings).to(module.weight.dtype)
    hot = hot if module.padding_idx is None else hot * (ids != module.padding_idx)[..., None]
    return _dense_features(module, hot)


def _embedding_project(module: nn.Embedding, ids: Tensor, b: Tensor) -> Float[Tensor, "n t 1 q"]:
    flat = ids.reshape(b.shape[0], 1, -1).expand(-1, b.shape[1], -1)
    found = b.gather(2, flat)
    if module.padding_idx is not None:
        found = found * (flat != module.padding_idx)
    return found.mT.unsqueeze(2)


_EMBEDDING = Kind(
    lambda module: _runs(nn.Embedding)(module) and getattr(module, "max_norm", None) is None,
    lambda module, w: w.mT,
    _embedding_features,
    _embedding_project,
    outputs_last=_same,
    outputs_back=_same,
)


# -- convolutions ----------------------------------------------------------------------------------------------

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _batched(module: Any, x: Tensor) -> Tensor:
    return x[None] if x.ndim == len(module.kernel_size) + 1 else x


def _padded(module: Any, x: Tensor) -> Tensor:
    pad = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(_batched(module, x), pad, mode=mode) if any(pad) else _batched(module, x)


def _windows(x: Tensor, module: Any, stride: tuple[int, ...]) -> Float[Tensor, "n t c m"]:
    """Every window of a padded input, flattened as a kernel of the module is."""
    spatial = len(module.kernel_size)
    for i, (k, step, gap) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, (k - 1) * gap + 1, step)[..., ::gap]
    n, channels = x.shape[:2]
    t = math.prod(x.shape[2 : 2 + spatial])
    x = x.reshape(n, module.groups, channels // module.groups, t, *module.kernel_size)
    return x.movedim(3, 1).flatten(3)


def _conv_features(module: Any, x: Tensor) -> Float[Tensor, "n t c m"]:
    return _windows(_padded(module, x), module, module.stride)


def _conv_project(module: Any, x: Tensor, b: Float[Tensor, "n q m"]) -> Float[Tensor, "n t c q"]:
    """One convolution of the whole batch, each sample with its own q kernels."""
    x = _padded(module, x)
    n, channels, c, q = x.shape[0], x.shape[1], module.groups, b.shape[1]
    kernels = b.reshape(n, 1, q, channels // c, *module.kernel_size).expand(
        -1, c, *[-1] * (b.ndim + len(x.shape) - 3)
    )
    run = _CONV[len(module.kernel_size)]
    s = run(
        x.reshape(1, n * channels, *x.shape[2:]),
        kernels.reshape(n * c * q, channels // c, *module.kernel_size),
        stride=module.stride,
        dilation=module.dilation,
        groups=n * c,
    )
    return s.reshape(n, c, q, -1).permute(0, 3, 1, 2)


def _channels_last(module: Any, z: Tensor) -> Tensor:
    return _batched(module, z).movedim(1, -1)


def _channels_back(module: Any, z: Tensor) -> Tensor:
    return z.movedim(-1, 1)


_CONVOLUTION = Kind(
    _runs(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    lambda module, w: w.flatten(1),
    _conv_features,
    _conv_project,
    _channels_last,
    _channels_back,
)


def _transpose_matrix(module: Any, w: Tensor) -> Float[Tensor, "d m"]:
    """From (in, out / c, *k) to (out, in / c * k): a window of the stretched input sees the kernel flipped."""
    c = module.groups
    w = w.reshape(c, w.shape[0] // c, *w.shape[1:]).transpose(1, 2).flip(tuple(range(3, 2 + w.ndim - 1)))
    return w.flatten(0, 1).flatten(1)


def _transpose_features(module: Any, x: Tensor) -> Float[Tensor, "n t c m"]:
    """Windows of the input with zeros put between its pixels."""
    x = _batched(module, x)
    spatial = len(module.kernel_size)
    stretched = x
    pad: list[int] = []
    for i, (size, stride) in enumerate(zip(x.shape[2:], module.stride, strict=True)):
        dim = 2 + i
        wide = stretched.new_zeros(
            *stretched.shape[:dim], (size - 1) * stride + 1, *stretched.shape[dim + 1 :]
        )
        at = torch.arange(0, (size - 1) * stride + 1, stride, device=x.device)
        stretched = wide.index_copy(dim, at, stretched)
    for i in reversed(range(spatial)):
        reach = module.dilation[i] * (module.kernel_size[i] - 1) - module.padding[i]
        pad += [reach, reach + module.output_padding[i]]
    return _windows(F.pad(stretched, pad), module, (1,) * spatial)


def _transpose_project(module: Any, x: Tensor, b: Float[Tensor, "n q m"]) -> Float[Tensor, "n t c q"]:
    x = _batched(module, x)
    n, channels, c, q = x.shape[0], x.shape[1], module.groups, b.shape[1]
    spatial = len(module.kernel_size)
    kernels = b.reshape(n, 1, q, channels // c, *module.kernel_size).transpose(2, 3)
    kernels = kernels.flip(tuple(range(4, 4 + spatial))).expand(-1, c, *[-1] * (2 + spatial))
    s = _CONV_TRANSPOSE[spatial](
        x.reshape(1, n * channels, *x.shape[2:]),
        kernels.reshape(n * channels, q, *module.kernel_size),
        stride=module.stride,
        padding=module.padding,
        output_padding=module.output_padding,
        groups=n * c,
        dilation=module.dilation,
    )
    return s.reshape(n, c, q, -1).permute(0, 3, 1, 2)


_TRANSPOSED_CONVOLUTION = Kind(
    _runs(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    _transpose_matrix,
    _transpose_features,
    _transpose_project,
    _channels_last,
    _channels_back,
)

for _kind in (_TRANSPOSED_CONVOLUTION, _LORA, _TRANSPOSED_LINEAR, _EMBEDDING, _CONVOLUTION, _LINEAR):
    register(_kind)
