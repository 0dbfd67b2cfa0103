"""What relflat says of a published architecture, held against :mod:`held`."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from held import Held, parameter_of
from published import Published
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import relflat
from relflat import Flatness, LayerError, relative_flatness, relative_flatness_by_layer
from relflat.sizing import EVERY
from unbounded import FAM

FEW = 150  # directions of a network whose kappas are always held one by one


@functools.lru_cache(maxsize=1)
def made(case: Published) -> tuple[nn.Module, Held]:
    return case.model(), Held(case)


def measured(case: Published, layer: str, **options: Any) -> Any:
    return relative_flatness(made(case)[0], case.loss, [case.data], layer=layer, forward=case.run, **options)


def own_kappa(case: Published, layer: str) -> float:
    """The oracle's of one layer: a module's in that module alone, a parameter's wherever it is used."""
    held = made(case)[1]
    names = dict(held.model.named_parameters(remove_duplicate=False))
    if layer not in names and held.uses[id(names[f"{layer}.weight"])] > 1:
        held = Held(case, alone=layer)
    wanted = parameter_of(held.model, layer)
    return held.kappa(held.weight(next(n for n, p in held.parameters.items() if p is wanted)))


def tolerance(case: Published, kappa: float) -> float:
    """Of the order of rounding where the forward pass itself goes by way of float32."""
    return (1e-4 if made(case)[1].narrow else 1e-6) * (abs(kappa) + 1e-2)


def refused(case: Published, error: LayerError) -> str:
    assert case.unsure, error
    assert case.output in str(error), error
    return "refused, named"


def check_oracle(case: Published) -> None:
    """Double backward itself, by differences."""
    slip = made(case)[1].slip()
    assert slip < 1e-4, f"double backward and differences of gradients disagree by {slip}"


def check_output(case: Published) -> str:
    """Which layer it is, and its kappa."""
    held = made(case)[1]
    try:
        found = measured(case, "output")
    except LayerError as error:
        return refused(case, error)
    wanted = parameter_of(held.model, case.output)
    assert parameter_of(held.model, found.layer) is wanted, f"output is {case.output}, not {found.layer}"
    kappa = own_kappa(case, found.layer)
    assert abs(found.value - kappa) <= tolerance(case, kappa) + 6 * found.stderr, f"{found}: {kappa}"
    return found.method


def check_hidden(case: Published) -> str:
    found = measured(case, case.hidden, method="exact")
    kappa = own_kappa(case, case.hidden)
    assert abs(found.value - kappa) <= tolerance(case, kappa), f"{found}: {kappa}"
    return found.method


def check_star(case: Published, every: bool = True) -> str:
    """Which layers, and their kappas: one by one, or in larger networks the sum by few probes."""
    model, held = made(case)
    every = every or held.count() <= FEW
    options: dict[str, Any] = {} if every else {"method": "probe", "probes": 4}
    found = relative_flatness_by_layer(model, case.loss, [case.data], layer="*", forward=case.run, **options)
    names = {id(p): n for n, p in held.model.named_parameters()}
    got: dict[str, Flatness] = {}
    for name, flat in found.items():
        parameter = names[id(parameter_of(held.model, name))]
        assert parameter not in got, f"{parameter} twice"
        got[parameter] = flat
    missing, more = set(held.weights()) - set(got), set(got) - set(held.weights())
    assert not missing, f"missing {sorted(missing)}"
    assert not more, f"too many {sorted(more)}"
    if every:
        wrong = {}
        for name, (kappa, error) in held.kappas().items():
            flat = got[name]
            if abs(flat.value - kappa) > 3 * math.hypot(error, flat.stderr) > 0:  # by chance?
                flat = measured(case, flat.layer, method="exact")
            if not abs(flat.value - kappa) <= tolerance(case, kappa) + 6 * math.hypot(error, flat.stderr):
                wrong[name] = f"{flat} for {kappa} ± {error}"
        assert not wrong, f"wrong: {wrong}"
        return f"{len(got)} layers one by one, {sum(f.stderr > 0 for f in got.values())} by probes"
    kappa, error = held.sum_by_probes()
    value, stderr = sum(f.value for f in got.values()), math.hypot(*(f.stderr for f in got.values()))
    assert abs(value - kappa) <= tolerance(case, kappa) + 6 * math.hypot(error, stderr), (value, stderr, kappa, error)
    return f"sum over {len(got)} layers, by probes"


def check_step(case: Published) -> None:
    """A training step with the penalty of the output layer."""
    model = case.model().train()
    try:
        with FAM(case.loss, model, "output", strength=0.1) as criterion:
            stepped(case, model, criterion)
            assert math.isfinite(criterion.last["kappa"])
    except LayerError as error:
        refused(case, error)
        return
    assert any(p.grad.any() for p in model.parameters() if p.grad is not None)


def check_default(case: Published) -> str:
    """Training as one begins it: nothing chosen, float32, until after the default's second penalty."""
    model = case.model().float().train()
    plain, started = copy.deepcopy(model), copy.deepcopy(model)
    stepped(case, plain, case.loss, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # by as much where slopes are tiny
    with relflat.FAM(case.loss, model) as criterion:
        for step in range(EVERY + 1):
            optimizer.zero_grad()
            stepped(case, model, criterion, torch.float32)
            if step % EVERY == 0:
                last = criterion.last
                curved = [name for name, kappa in last["by_layer"].items() if kappa > 0]
                assert math.isfinite(last["penalty"]), last
                assert (last["penalty"] > 0) == bool(curved), last
                assert not last["skipped"], last
            if step == 0:
                regularised = [n for n in curved if any(p.requires_grad for p in matrices(model, n))]
                alike = unchanged(regularised, plain, model, lambda p: p.grad)
                assert not alike, f"the penalty has no gradient in {alike}"
            optimizer.step()
        assert last["penalties"] == 2
        still = unchanged(regularised, started, model, lambda p: p)
        assert not still, f"not trained: {still}"
        frozen = [n for n in criterion.layers if not any(p.requires_grad for p in matrices(model, n))]
        return f"{len(regularised)} of {len(criterion.layers)}" + f", {len(frozen)} frozen" * bool(frozen)


def stepped(case: Published, model: nn.Module, criterion: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    """Forward and backward pass, with the same random numbers whoever asks."""
    batch = tree_map(lambda x: x.to(dtype) if getattr(x, "dtype", None) is torch.float64 else x, case.data)
    torch.manual_seed(5)
    loss = criterion(*case.run(model, batch))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def unchanged(layers: list[str], a: nn.Module, b: nn.Module, of: Callable[[Tensor], Any]) -> list[str]:
    """Those of the layers in whose weight two models have the same."""
    pairs = {n: zip(matrices(a, n), matrices(b, n), strict=True) for n in layers}
    same = lambda p, q: p is q if p is None or q is None else torch.equal(p, q)
    return [n for n, pair in pairs.items() if all(same(of(p), of(q)) for p, q in pair)]


def matrices(model: nn.Module, layer: str) -> list[Tensor]:
    """What is trained of the weight of a layer: a parameter, or those of a module, from which it may be computed."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return [named[layer]] if layer in named else [p for p in model.get_submodule(layer).parameters() if p.ndim > 1]
