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


def as_rows(x: Float[Tensor, "... m"]) -> Float[Tensor, "n t m"]:
    """As (samples, positions, features); one sample if it has no batch dimension."""
    x = x[None] if x.ndim == 1 else x
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


@dataclass(frozen=True)
class Kind:
    """How a class of layer acts linearly; by default features and outputs are in the last dimension.

    Channel groups c (grouped convolutions, else one) split the outputs evenly; each has features of its own.

    Attributes:
        matches: whether a module is of this kind.
        matrix: ``(module, weight) -> (d, m)``, the weight as W. May not copy.
        features: ``(module, input) -> (n, t, c, m)``, phi at every sample, position and group.
        project: ``(module, input, b) -> (n, t, c, q)`` with ``b`` of shape (n, q, m), or (1, q, m) for all
            samples: ``b . phi`` without forming phi.
        outputs_last: ``(module, output) -> (n, ..., d)``, a view.
        outputs_back: undoes ``outputs_last``.
        trusted: whether a module computes what its class says. If not, each call is compared with ``W phi + b``,
            and a layer that gives something else is taken in its weight (:func:`is_linear`).
        problem: ``module ->`` why the layer as it is now is not one linear map of its input, with ``{layer}`` for
            its name; or None.
    """

    matches: Callable[[nn.Module], bool]
    matrix: Callable[[Any, Tensor], Tensor]
    features: Callable[[Any, Tensor], Tensor] = lambda module, x: as_rows(x).unsqueeze(2)
    project: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, x, b: (as_rows(x) @ b.mT).unsqueeze(2)
    outputs_last: Callable[[Any, Tensor], Tensor] = lambda module, z: z
    outputs_back: Callable[[Any, Tensor], Tensor] = lambda module, z: z
    trusted: Callable[[Any], bool] = lambda module: "forward" not in vars(module)
    problem: Callable[[Any], str | None] = lambda module: None


_KINDS: list[Kind] = []


def register(kind: Kind) -> Kind:
    """Add a class of layer; asked before those that are there already (an example: docs/architecture.md)."""
    _KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None."""
    return next((k for k in _KINDS if k.matches(module)), None)


def is_linear(
    kind: Kind, module: Any, x: Tensor, weight: Float[Tensor, "d m"], output: Tensor, turn: int | None = None
) -> bool:
    """Whether an output, or two samples of it by ``turn``, is ``W phi + b`` of the input, in both's precision."""
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows, groups = as_rows(kind.outputs_last(module, output)), getattr(module, "groups", 1)
            wide = torch.promote_types(output.dtype, torch.float32)
            if turn is not None and rows.shape[0] > 2:
                x, rows = (t[[0, turn % len(rows)]] for t in (x, rows))
            eps = max(torch.finfo(t.dtype).eps for t in (x, weight, output) if t.is_floating_point())
            x, w = x.to(wide) if x.is_floating_point() else x, weight.to(wide)
            if groups == 1:
                z = kind.project(module, x, w[None]).squeeze(2)
            else:
                by_group = w.reshape(groups, -1, w.shape[1])
                z = torch.einsum("ntcm,com->ntco", kind.features(module, x), by_group).flatten(2)
            bias = getattr(getattr(module, "base_layer", module), "bias", None)
            z, rows = z if bias is None else z + bias, rows.to(wide)
            size = torch.maximum(z.flatten(1).norm(dim=1), rows.flatten(1).norm(dim=1))
            close = (z - rows).flatten(1).norm(dim=1) <= min(2 * math.sqrt(eps), 0.03) * size
            return z.shape == rows.shape and bool(close.all())
    except (RuntimeError, IndexError, AttributeError):  # other shapes than the kind has
        return False


def weight_of(module: Any) -> Tensor:
    """The weight tensor of a module of a known kind; a parameter is its own."""
    return module if isinstance(module, nn.Parameter) else module._modules.get("base_layer", module).weight


def parametrization_of(module: Any) -> nn.Module | None:
    """What computes the weight of a module of a known kind (``torch.nn.utils.parametrize``), if anything does."""
    found = module._modules.get("base_layer", module)._modules.get("parametrizations")
    return found["weight"] if found is not None and "weight" in found else None


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters the weight is made of: itself, or what it is computed from in the module."""
    return [p for p in module.parameters() if p.ndim > 1]


def _runs(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Trust modules that run the forward of one of the classes, not one of their own."""
    forwards = {c.forward for c in classes}
    return lambda module: "forward" not in vars(module) and type(module).forward in forwards


def _from(*packages: str) -> Callable[[nn.Module], bool]:
    return lambda module: "forward" not in vars(module) and type(module).__module__.startswith(packages)


_LINEAR = Kind(lambda module: isinstance(module, nn.Linear), lambda module, w: w, trusted=_runs(nn.Linear))

# Conv1D of GPT-2 (transformers), a dense layer whose weight is stored as (m, d).
_TRANSPOSED_LINEAR = Kind(
    lambda module: type(module).__name__ == "Conv1D" and hasattr(module, "nf"),
    lambda module, w: w.mT,
    trusted=_from("transformers."),
)


def _adapters(module: Any) -> list[str]:
    """Names of the adapters that act; those switched off, or merged into the base, do not."""
    acts = not (module.disable_adapters or module.merged)
    return [name for name in module.active_adapters if acts and name in module.lora_A]


def _lora_matrix(module: Any, w: Tensor) -> Float[Tensor, "d m"]:
    """Effective weight of a dense layer wrapped by ``peft``: frozen base plus trainable factors."""
    for name in _adapters(module):
        w = w + module.scaling[name] * (module.lora_B[name].weight @ module.lora_A[name].weight)
    return w


def _lora_problem(module: Any) -> str | None:
    """Dropout on an adapter's input gives it other features than the base layer has."""
    dropout = dict(getattr(module, "lora_dropout", {}))
    for name in [n for n in _adapters(module) if n in dropout]:
        if dropout[name].training and getattr(dropout[name], "p", 0.0) > 0:
            return (
                f"adapter {name!r} of layer '{{layer}}' has active dropout (lora_dropout), so it sees other features "
                "than the base layer does, and the two are not one linear map with a kappa; set lora_dropout=0, or "
                f"name a factor by itself, such as '{{layer}}.lora_B.{name}', whose kappa is defined"
            )
    return None


_LORA = Kind(
    lambda module: (
        isinstance(getattr(module, "lora_A", None), nn.ModuleDict)  # not AdaLoRA, whose factors are three
        and isinstance(getattr(module, "base_layer", None), nn.Linear)
        and not getattr(module, "lora_magnitude_vector", None)  # DoRA has another effective weight
    ),
    _lora_matrix,
    trusted=_from("peft."),
    problem=_lora_problem,
)


def _embedding_features(module: nn.Embedding, ids: Tensor) -> Float[Tensor, "n t 1 m"]:
    """One-hot rows; zero at the padding index, which the layer treats as a constant."""
    hot = F.one_hot(ids.long(), module.num_embeddings).to(module.weight.dtype)
    hot = hot if module.padding_idx is None else hot * (ids != module.padding_idx)[..., None]
    return as_rows(hot).unsqueeze(2)


def _embedding_project(module: nn.Embedding, ids: Tensor, b: Tensor) -> Float[Tensor, "n t 1 q"]:
    n = ids.shape[0] if ids.ndim else 1
    flat = ids.long().reshape(n, 1, -1).expand(-1, b.shape[1], -1)
    found = b.expand(n, -1, -1).gather(2, flat)
    if module.padding_idx is not None:
        found = found * (flat != module.padding_idx)
    return found.mT.unsqueeze(2)


_EMBEDDING = Kind(
    lambda module: isinstance(module, nn.Embedding),  # max_norm has changed the weight before it is read
    lambda module, w: w.mT,
    _embedding_features,
    _embedding_project,
    trusted=_runs(nn.Embedding),
)


def _batched(module: Any, x: Tensor) -> Tensor:
    return x[None] if x.ndim == len(module.kernel_size) + 1 else x


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """What the kernel of a convolution slides over, its steps, and the zeros around that are yet to be added."""
    x, pad = _batched(module, x), module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, module.stride, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, pad, mode=mode) if any(pad) else x, module.stride, (0,) * len(module.stride)


def _stretched(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """As :func:`_padded`: a transposed convolution is a convolution of the input with zeros between its pixels."""
    x = _batched(module, x)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    places: Any = (..., *[slice(None, None, step) for step in module.stride])
    wide[places] = x
    pad: list[int] = []
    for i in reversed(range(len(sizes))):
        reach = module.dilation[i] * (module.kernel_size[i] - 1) - module.padding[i]
        pad += [reach, reach + module.output_padding[i]]
    return F.pad(wide, pad), (1,) * len(sizes), (0,) * len(sizes)


def _windows(module: Any, x: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Float[Tensor, "n t c m"]:
    """Every window of an input, flattened as a kernel of the module is."""
    x, spatial = F.pad(x, [p for p in reversed(padding) for _ in range(2)]), len(module.kernel_size)
    for i, (k, step, gap) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, (k - 1) * gap + 1, step)[..., ::gap]
    (n, channels), c = x.shape[:2], module.groups
    x = x.reshape(n, c, channels // c, math.prod(x.shape[2 : 2 + spatial]), *module.kernel_size)
    return x.movedim(3, 1).flatten(3)


def _convolved(
    module: Any, b: Float[Tensor, "n q m"], x: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Float[Tensor, "n t c q"]:
    """``b`` times the windows of an input: a convolution with q kernels, grouped where each sample has its own."""
    (n, channels), c, (own, q, _), kernel = x.shape[:2], module.groups, b.shape, module.kernel_size
    kernels = b.reshape(own, 1, q, channels // c, *kernel).expand(-1, c, *[-1] * (2 + len(kernel)))
    kernels = kernels.reshape(own * c * q, channels // c, *kernel)
    x, convolve = x.reshape(n // own, own * channels, *x.shape[2:]), getattr(F, f"conv{len(kernel)}d")
    s = convolve(x, kernels, stride=stride, padding=padding, dilation=module.dilation, groups=own * c)
    return s.reshape(n, c, q, -1).permute(0, 3, 1, 2)


def transposed_matrix(groups: int, w: Tensor) -> Float[Tensor, "d m"]:
    """From (in, out / c, *k) to (out, in / c * k): a window of the stretched input sees the kernel flipped."""
    w = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2).flip(tuple(range(3, w.ndim + 1)))
    return w.flatten(0, 1).flatten(1)


def _convolution(
    classes: tuple[type[nn.Module], ...],
    matrix: Callable[[Any, Tensor], Tensor],
    over: Callable[[Any, Tensor], tuple[Tensor, tuple[int, ...], tuple[int, ...]]],
) -> Kind:
    return Kind(
        lambda module: isinstance(module, classes),
        matrix,
        lambda module, x: _windows(module, *over(module, x)),
        lambda module, x, b: _convolved(module, b, *over(module, x)),
        lambda module, z: _batched(module, z).movedim(1, -1),
        lambda module, z: z.movedim(-1, 1),
        trusted=_runs(*classes),
    )


_CONVOLUTION = _convolution((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda module, w: w.flatten(1), _padded)
_TRANSPOSED_CONVOLUTION = _convolution(
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    lambda module, w: transposed_matrix(module.groups, w),
    _stretched,
)

for _kind in (_TRANSPOSED_CONVOLUTION, _LORA, _TRANSPOSED_LINEAR, _EMBEDDING, _CONVOLUTION, _LINEAR):
    register(_kind)
