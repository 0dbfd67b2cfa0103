"""The layers whose weight acts linearly, and how each sees its input and output as rows.

A layer of a supported class computes ``z = W phi + b`` at every position of every sample. To add a class,
add one entry to ``_ROWS``.
"""

from collections.abc import Callable
from difflib import get_close_matches

from jaxtyping import Float
from torch import Tensor, nn


def _linear(x: Float[Tensor, "... k"]) -> Float[Tensor, "n t k"]:
    """See ``(n, ..., k)`` as samples x positions x k; a vector is one sample."""
    if x.ndim == 1:
        return x[None, None]
    return x.reshape(x.shape[0], -1, x.shape[-1])


_ROWS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.Linear: _linear}


def is_supported(module: nn.Module) -> bool:
    """Whether the module's class, or the one it inherits its forward from, is known to act linearly."""
    return any(isinstance(module, c) and type(module).forward is c.forward for c in _ROWS)


def rows(module: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "n t k"]:
    """The layer's input or output as (samples, positions, features)."""
    return next(f for c, f in _ROWS.items() if isinstance(module, c))(x)


def supported_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of the model that can be tapped, in order of registration."""
    return {name: m for name, m in model.named_modules() if is_supported(m)}


def nearest(name: str, candidates: dict[str, nn.Module]) -> str:
    """The candidate spelled most like ``name``, for error messages."""
    ending = [c for c in candidates if c.endswith(f".{name}")]
    close = ending or get_close_matches(name, list(candidates), n=3, cutoff=0.3) or list(candidates)[:3]
    return " or ".join(map(repr, close)) or "'output'"


def unsupported_message(module: nn.Module) -> str:
    """Say why the module cannot be tapped."""
    known = ", ".join(c.__name__ for c in _ROWS)
    return f"{type(module).__name__} is not a layer that acts linearly on its input (supported: {known})"
