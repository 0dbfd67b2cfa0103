"""What the user may call a layer, and the modules it means."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from relflat.errors import LayerError
from relflat.layers import is_supported, nearest, supported_layers, unsupported_message

Layer = str | nn.Module | Sequence["str | nn.Module"]


def resolve(model: nn.Module, layer: Layer) -> dict[str, nn.Module]:
    """Map what the user calls a layer to ``{qualified name: module}``.

    Args:
        model: the network.
        layer: a module of it, a qualified name, a glob, or a list of those. ``"output"`` maps to every
            supported layer; :class:`Tap` narrows it down during the first forward pass.

    Raises:
        LayerError: if nothing matches, or a match is not a supported layer; names the candidates.
    """
    candidates = supported_layers(model)
    if isinstance(layer, nn.Module):
        name = next((n for n, m in model.named_modules(remove_duplicate=False) if m is layer), None)
        if name is None:
            raise LayerError(
                f"the given {type(layer).__name__} is not part of this model; "
                f"its supported layers are {list(candidates)}"
            )
        return _checked({name: layer}, candidates)
    if isinstance(layer, str):
        return _resolve_name(model, layer, candidates)
    if not layer:
        raise LayerError(f"the list of layers is empty; name at least one of {list(candidates)}")
    found: dict[str, nn.Module] = {}
    for one in layer:
        found |= resolve(model, one)
    return found


def _resolve_name(model: nn.Module, name: str, candidates: dict[str, nn.Module]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules and (name or is_supported(model)):
        return _checked({name: modules[name]}, candidates)
    if name == "output":
        if not candidates:
            raise LayerError(f"{type(model).__name__} has no supported layer: " + unsupported_message(model))
        return candidates
    if any(c in name for c in "*?["):
        matches = {n: m for n, m in candidates.items() if fnmatchcase(n, name)}
        if matches:
            return matches
    raise LayerError(
        f"no layer named {name!r}; did you mean {nearest(name, candidates)}? "
        f"Supported layers: {list(candidates)}, or 'output'"
    )


def _checked(found: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> dict[str, nn.Module]:
    for name, module in found.items():
        if not is_supported(module):
            inside = [c for c in candidates if c.startswith(f"{name}.")] or list(candidates)
            raise LayerError(f"layer {name!r}: {unsupported_message(module)}; candidates: {inside}")
    return found
