"""What relflat says of a published architecture, held against :mod:`held`."""

import copy
import functools
import math
from typing import Any

import torch
from held import PROBES, Held, parameter_of, untied
from published import Published
from torch import Tensor, nn

from relflat import FAM, relative_flatness, relative_flatness_by_layer


@functools.lru_cache(maxsize=1)
def made(case: Published) -> tuple[nn.Module, Held]:
    model = case.model()
    return model, Held(case, model)


def measured(case: Published, model: nn.Module, layer: str, **options: Any) -> Any:
    return relative_flatness(model, case.loss, [case.data], layer=layer, forward=case.run, **options)


def own_kappa(case: Published, layer: str) -> float:
    """The oracle's of one layer: a module's in that module alone, a parameter's wherever it is used."""
    model, whole = made(case)
    name = next(n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter_of(model, layer))
    if layer in dict(model.named_parameters(remove_duplicate=False)):
        return whole.kappa(whole.weight(name))
    parted = untied(model, layer)
    held = Held(case, parted)
    wanted = parameter_of(held.model, layer)
    return held.kappa(held.weight(next(n for n, p in held.parameters.items() if p is wanted)))


def tolerance(case: Published, kappa: float) -> float:
    return 1e-7 + abs(kappa) * 1e-6 if not case.precision else case.precision * (1 + abs(kappa))


def check_output(case: Published) -> str:
    model, _ = made(case)
    found = measured(case, model, "output")
    assert found.layer == case.output, f"output is {case.output}, not {found.layer}"
    kappa = own_kappa(case, case.output)
    assert abs(found.value - kappa) <= tolerance(case, kappa) + 5 * found.stderr, f"{found}: {kappa}"
    return found.method


def check_hidden(case: Published) -> str:
    model, _ = made(case)
    found = measured(case, model, case.hidden, method="exact")
    kappa = own_kappa(case, case.hidden)
    assert abs(found.value - kappa) <= tolerance(case, kappa), f"{found}: {kappa}"
    return found.method


def check_star(case: Published) -> str:
    """Names and values of all layers."""
    model, held = made(case)
    found = relative_flatness_by_layer(
        model, case.loss, [case.data], layer="*", forward=case.run, probes=PROBES
    )
    names = {id(p): n for n, p in model.named_parameters()}
    got: dict[str, Any] = {}
    for name, flat in found.items():
        parameter = names[id(parameter_of(model, name))]
        assert parameter not in got, f"{parameter} twice"
        got[parameter] = flat
    wanted = held.kappas()
    missing, more = set(wanted) - set(got), set(got) - set(wanted)
    assert not missing and not more, f"missing {sorted(missing)}, too many {sorted(more)}"
    wrong = {}
    for name, (kappa, error) in wanted.items():
        flat = got[name]
        if not abs(flat.value - kappa) <= tolerance(case, kappa) + 5 * math.hypot(error, flat.stderr):
            wrong[name] = f"{flat} for {kappa} ± {error}"
    assert not wrong, f"wrong: {wrong}"
    return f"{len(got)} layers, {sum(f.stderr > 0 for f in got.values())} by probes"


def check_step(case: Published) -> None:
    for layer in ("output", "*"):
        model = case.model().train()
        with FAM(case.loss, model, layer, strength=0.1) as criterion:
            loss = criterion(*case.run(model, case.data))
            assert loss.isfinite(), layer
            loss.backward()
            assert math.isfinite(criterion.last["kappa"]), layer
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), layer


def check_oracle(case: Published) -> None:
    slip = made(case)[1].slip()
    assert slip < 1e-4, f"double backward and differences of gradients disagree by {slip}"
