"""What the user may call a layer, and the modules or parameters it means."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relflat.capture.kinds import kind_of
from relflat.errors import LayerError

Layer = str | nn.Module | nn.Parameter | Sequence["str | nn.Module | nn.Parameter"]
Target = nn.Module | nn.Parameter


def resolve(model: nn.Module, layer: Layer) -> dict[str, Target]:
    """Map what the user calls a layer to ``{qualified name: module or parameter}``.

    A module of a known kind stands for itself. A parameter, or the only matrix of a module of another kind,
    is differentiated directly, whatever the network does with it; what a product in the graph sums over are its
    features, and where none tells, its rows are its outputs, as it is stored.

    Raises:
        LayerError: if nothing matches, or a match has no weight matrix; names the candidates.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise LayerError(
            "the model is a TorchScript program, whose layers cannot be watched; give it as it was before"
        )
    if isinstance(layer, str):
        return _by_name(model, layer)
    if isinstance(layer, nn.Module | nn.Parameter):
        name = next((n for n, part in _parts(model).items() if part is layer), None)
        if name is None:
            raise LayerError(f"the given {type(layer).__name__} is not part of this model; {_candidates(model)}")
        return {name: _target(model, name, layer)}
    if not layer:
        raise LayerError(f"the list of layers is empty; {_candidates(model)}")
    return {name: target for one in layer for name, target in resolve(model, one).items()}


def is_pattern(model: nn.Module, layer: object) -> str | None:
    """Whether what the user calls a layer stands for what is found later: ``"output"`` or ``"glob"``."""
    if not isinstance(layer, str) or (layer != "output" and layer in _parts(model)):
        return None
    return "output" if layer == "output" else "glob" if set(layer) & set("*?[") else None


def part(model: nn.Module, name: str, before: Target) -> Target | None:
    """What is in the model now under the name that a module or parameter had before; None if nothing is."""
    at: Any = model
    for step in name.split(".") if name else ():
        at = at._modules.get(step, at._parameters.get(step)) if isinstance(at, nn.Module) else None
    if isinstance(at, nn.Module) and isinstance(before, nn.Parameter):  # named by the module it is the matrix of
        at = next((p for p in at.parameters(recurse=False) if p.ndim > 1), None)
    return before if isinstance(at, Tensor) and not isinstance(at, nn.Parameter) else at  # by functional_call


def mode_of(model: nn.Module) -> int:
    """Stands for which modules are in training mode."""
    order, flags = [model], []
    found = set(order)
    for module in order:  # grows meanwhile
        flags.append(module.training)
        new = [m for m in module._modules.values() if m is not None and m not in found]
        found.update(new)
        order += new
    return hash(tuple(flags))


def _parts(model: nn.Module) -> dict[str, Target]:
    """All modules and parameters, under every name they have."""
    return {
        **dict(model.named_modules(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _by_name(model: nn.Module, name: str) -> dict[str, Target]:
    parts, supported, others = _parts(model), supported_layers(model), matrices(model)
    if name in parts and name != "output" and (name or kind_of(model)):
        return {name: _target(model, name, parts[name])}
    if name == "output":
        return _possible_outputs(model, supported)
    if set(name) & set("*?[") and (matches := _matching(model, name)):
        return {n: _target(model, n, parts[n]) for n in matches}
    near = nearest(name, [*supported, *others])
    hint = f"did you mean {near}? " if near else ""
    raise LayerError(f"no layer named {name!r}; {hint}{_candidates(model)}")


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """The layers and the parameters of none; if none matches, the parts of layers, then their parameters."""
    supported, others = supported_layers(model), matrices(model)
    apart = [n for n in others if not any(not s or n.startswith(f"{s}.") for s in supported)]
    modules = [n for n, m in model.named_modules() if kind_of(m)]
    groups = ([n for n in names if fnmatchcase(n, pattern)] for names in ((*supported, *apart), modules, others))
    return next(filter(None, groups), [])


def _possible_outputs(model: nn.Module, supported: dict[str, nn.Module]) -> dict[str, Target]:
    if not supported and matrices(model):
        return dict(matrices(model))
    if not supported:
        quantised = [n for n, m in model.named_modules() if ".quantized." in type(m).__module__]
        why = f": {quantised} are quantised; take the model before" if quantised else ""
        raise LayerError(f"{type(model).__name__} has no supported layer{why}; {_candidates(model)}")
    problems = {name: _unusable(name, module) for name, module in supported.items()}
    usable: dict[str, Target] = {n: m for n, m in supported.items() if problems[n] is None}
    if not usable:
        raise LayerError(next(iter(problems.values())))
    return usable


def _target(model: nn.Module, name: str, found: Target) -> Target:
    """Check a match: a known kind, a matrix, or a module with a single matrix of its own."""
    problem = _unusable(name, found)
    if problem is not None:
        raise LayerError(problem)
    if isinstance(found, nn.Parameter):
        if found.ndim < 2:
            raise LayerError(
                f"parameter {name!r} has shape {tuple(found.shape)}, no rows and columns; {_candidates(model)}"
            )
        return found
    if kind_of(found):
        return found
    own = [p for p in found.parameters(recurse=False) if p.ndim >= 2]
    if len(own) == 1:
        return own[0]
    inside = [n for n in (*supported_layers(model), *matrices(model)) if n.startswith(f"{name}.")]
    raise LayerError(
        f"layer {name!r}: {type(found).__name__} is not a layer that acts linearly on its input by one weight; "
        + (f"candidates: {inside}" if inside else _candidates(model))
    )


def _unusable(name: str, found: Target) -> str | None:
    """Why a layer's weight cannot be differentiated, and what to do; None if it can."""
    origin = type(found).__module__
    if ".quantized." in origin:
        return f"layer {name!r} is quantised ({origin}): take the model before it is quantised"
    own: list[Tensor] = []
    if isinstance(found, nn.Module):
        own += [p for p in getattr(found, "base_layer", found).parameters(recurse=False) if p.ndim >= 2]
    else:
        own.append(found)
    return next((f"the weight of {name!r} is {problem}" for problem in map(_problem, own) if problem), None)


def _problem(w: Tensor) -> str | None:
    if is_lazy(w):
        return "not initialised yet; first run the model on a batch, or name the module"
    if w.is_meta:
        return "on the meta device and holds no numbers; first call model.to_empty(device=...) and load the weights"
    if w.layout != torch.strided:
        return f"{w.layout}; make it dense: weight.to_dense()"
    if w.is_complex():
        return (
            f"{w.dtype}; kappa is defined for real weights: keep the real and the imaginary part as two parameters "
            "(torch.view_as_real)"
        )
    if not w.is_floating_point():
        return f"{w.dtype}, and its curvature needs real numbers; take the model before it is quantised"
    return None


def _candidates(model: nn.Module) -> str:
    layers = list(supported_layers(model))
    others = [n for n in matrices(model) if n.removesuffix(".weight") not in layers]
    last = ", or 'output'" if layers else ""
    return f"layers: {layers}{last}" + (f"; parameters: {others}" if others else "")


def supported_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of the model of a known kind, in order of registration; a layer made of others is one."""
    found = {name: m for name, m in model.named_modules() if kind_of(m)}
    inner = {part for m in found.values() for part in m.modules() if part is not m}
    return {name: m for name, m in found.items() if m not in inner}


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of the model with two or more dimensions."""
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


def nearest(name: str, candidates: list[str]) -> str:
    """The candidates spelled most like ``name``, for error messages; none if nothing is like it."""
    ending = [c for c in candidates if c.endswith(f".{name}")]
    return " or ".join(map(repr, ending or get_close_matches(name, candidates, n=3, cutoff=0.4)))
