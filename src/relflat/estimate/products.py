"""Kappa from products with a curvature: exact sums over a basis, and random directions (I3 to I7, I9)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from relflat.curvature.operators import Operator, pull
from relflat.curvature.space import Shares, Space, product
from relflat.estimate.contributions import Contributions
from relflat.loss.known import KnownLoss
from relflat.options import Options
from relflat.rng import Rng

_RANK = 16  # of the random matrices in measuring: their cost is small beside that of a product


def exact(operator: Operator, space: Space, options: Options) -> Contributions:
    """The sum of the definition over a basis, one product for each of its terms."""
    kappas, traces = [], []
    if options.adaptive:
        kappas = [_quadratic(space, operator, column, options) for column in space.columns()]
    for term in space.terms() if options.trace or not options.adaptive else ():
        (curved,) = product(operator, [space], [term.direction])
        if not options.adaptive:
            # the gradient of Lemma 1 in W and phi is in the left factor, that of the curvature in H
            kappas.append(space.inner(term.kappa, curved if options.full else curved.detach()))
        traces.append(space.inner(term.trace, curved).detach())
    trace = torch.stack(traces).sum(0)[None] if options.trace else None
    method = f"exact({space.where})" if space.where else "exact"
    return Contributions(torch.stack(kappas).sum(0)[None], trace, method, True)


def sampled(operator: Operator, space: Space, options: Options, rng: Rng, name: str) -> Contributions:
    """Quadratic forms of ``options.probes`` random directions, in training."""
    directions = (space.probe(rng, adaptive=options.adaptive) for _ in range(options.probes))
    return _of_probes([_quadratic(space, operator, u, options) for u in directions], None, name, space, options)


def measured(
    operator: Operator, spaces: Sequence[Space], options: Options, rng: Rng, name: str
) -> list[Contributions]:
    """The same in measuring, in all spaces at once: a product serves every layer.

    With H the Hessian in all layers together and independent directions, ``<u_l, (H u)_l>`` has the mean of
    ``<u_l, H_ll u_l>``: what mixes layers has mean 0, and adds variance. The layers' directions are scaled so that
    this is much the same share of each (:func:`_sizes`).

    The variance is taken from the images: of ``<u, M u>`` with u normal it is ``2 ||M||_F^2``, and ``E ||M u||^2 =
    ||M||_F^2``; what mixes layers counts double in it. That of a few values would be small where they all come out
    low, as they are skewed.
    """
    kinds = (False, True) if options.trace else (False,)
    sizes = _sizes(operator, spaces, options, rng)
    values: dict[tuple[int, bool], list[Tensor]] = {(i, t): [] for i in range(len(spaces)) for t in kinds}
    squares: dict[tuple[int, bool], list[Tensor]] = {key: [] for key in values}
    for _, trace in itertools.product(range(options.probes), kinds):
        directions = [_direction(s, options, rng, trace) / size[trace] for s, size in zip(spaces, sizes, strict=True)]
        images = product(operator, spaces, directions)
        for i, (space, u, image) in enumerate(zip(spaces, directions, images, strict=True)):
            scale = sizes[i][trace] ** 2
            norms = space.squared_norms(image.detach(), rng, adaptive=options.adaptive, trace=trace)
            values[i, trace].append(space.inner(u.detach(), image.detach()) * scale)
            squares[i, trace].append(norms[trace].detach() * scale)
    found = []
    for i, space in enumerate(spaces):
        each = _of_probes(values[i, False], values.get((i, True)), name, space, options)
        if options.probes > 1:
            spreads = [2 * torch.stack(squares[i, t]).double().mean(0) / options.probes for t in kinds]
            each = replace(each, variances=(spreads[0], spreads[-1]))
        found.append(each)
    return found


def _direction(space: Space, options: Options, rng: Rng, trace: bool) -> Tensor:
    return space.trace_probe(rng, rank=_RANK) if trace else space.probe(rng, adaptive=options.adaptive, rank=_RANK)


def _sizes(operator: Operator, spaces: Sequence[Space], options: Options, rng: Rng) -> list[tuple[float, float]]:
    """What each layer's directions are divided by, for kappa and ``Tr H``: the size of its slope, up to a constant.

    Any numbers would do that do not depend on the directions. Curvature is about the square of the slope.
    """
    if len(spaces) == 1:
        return [(1.0, 1.0)]
    slopes, found = iter(operator.slope_at_calls()), []
    for space in spaces:
        g = space.pulled([next(slopes) for _ in space.calls]).detach()
        norms = space.squared_norms(g, rng, adaptive=options.adaptive, trace=True)
        found.append([float(x.detach().sum()) for x in norms])
    most = [max(column) for column in zip(*found, strict=True)]
    if not all(0 < m < math.inf for m in most):
        return [(1.0, 1.0)] * len(spaces)
    return [(max(k, 1e-6 * most[0]) ** 0.5, max(t, 1e-6 * most[1]) ** 0.5) for k, t in found]


def factored(spaces: Sequence[Space], known: KnownLoss, options: Options, rng: Rng) -> list[Contributions]:
    """Probes in the space of the logits (I7): ``r = S eps`` with ``S S' = A``, one pull-back for all layers.

    With ``g = J' r`` the share of a group is ``||sum_t (W' g_t) phi_t'||_F^2``, never negative.
    """
    calls = [c for s in spaces for c in s.calls]
    kappas: list[list[Tensor]] = [[] for _ in spaces]
    traces: list[list[Tensor]] = [[] for _ in spaces]
    for r in _factors(known, options, rng):
        pulled = iter(pull([known.outputs], calls, [r], create_graph=options.full))
        for i, space in enumerate(spaces):
            g = space.pulled([next(pulled) for _ in space.calls])
            kappa, trace = space.squared_norms(g, rng, adaptive=options.adaptive, trace=options.trace)
            kappas[i].append(kappa)
            traces[i].append(trace)
    return [
        _of_probes(k, t if options.trace else None, options.curvature, space, options)
        for k, t, space in zip(kappas, traces, spaces, strict=True)
    ]


def _factors(known: KnownLoss, options: Options, rng: Rng) -> Iterator[Tensor]:
    """Random vectors in the space of the outputs whose second moment is the Hessian of the loss there."""
    hessian, rows = known.hessian(constant=not options.full), known.rows()
    like = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for _ in range(options.probes):
        eps = rng.signs(tuple(rows.reshape(-1, rows.shape[-1] if rows.ndim else 1).shape), like)
        yield known.from_rows(hessian.factor(eps))


def _quadratic(space: Space, operator: Operator, u: Tensor, options: Options) -> Shares:
    """``<u, H u>`` for each group; with H constant ``2 <u, stop(Hu)> - stop(<u, Hu>)`` has its gradient."""
    (curved,) = product(operator, [space], [u if options.full else u.detach()])
    if options.full:
        return space.inner(u, curved)
    linear = space.inner(u, curved.detach())
    return 2 * linear - linear.detach()


def _of_probes(
    kappas: list[Tensor], traces: list[Tensor] | None, name: str, space: Space, options: Options
) -> Contributions:
    where = f"{name} in {space.where}" if space.where else name
    trace = torch.stack(traces) if traces else None
    return Contributions(torch.stack(kappas), trace, f"probe({where}, {options.probes})", False)
