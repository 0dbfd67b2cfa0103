"""Kappa from products with a curvature: exact sums over a basis, and random directions (I3 to I7, I9)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from relflat.curvature.operators import Operator, pull
from relflat.curvature.space import Shares, Space
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
        curved = space.product(operator, term.direction)
        if not options.adaptive:
            # the gradient of Lemma 1 in W and phi is in the left factor, that of the curvature in H
            kappas.append(space.inner(term.kappa, curved if options.full else curved.detach()))
        traces.append(space.inner(term.trace, curved).detach())
    trace = torch.stack(traces).sum(0)[None] if options.trace else None
    method = f"exact({space.where})" if space.where else "exact"
    return Contributions(torch.stack(kappas).sum(0)[None], trace, method, True)


def sampled(operator: Operator, space: Space, options: Options, rng: Rng, name: str) -> Contributions:
    """Quadratic forms of ``options.probes`` random directions.

    In measuring their variance is taken from the images: of ``<u, M u>`` with u normal it is ``2 ||M||_F^2``, and
    ``E ||M u||^2 = ||M||_F^2``. That of a few values would be small where they all come out low, as they are skewed.
    """
    kappas, traces, squares, measuring = [], [], [], options.measuring
    how = {"rank": _RANK} if measuring else {}
    for _ in range(options.probes):
        direction = space.probe(rng, adaptive=options.adaptive, **how)
        if not measuring:
            kappas.append(_quadratic(space, operator, direction, options))
            continue
        image = space.product(operator, direction)
        kappas.append(space.inner(direction, image))
        square, trace_square = space.squared_norms(image, rng, adaptive=options.adaptive, trace=False)
        if options.trace:
            signs = space.trace_probe(rng, **how)
            image = space.product(operator, signs)
            traces.append(space.inner(signs, image).detach())
            _, trace_square = space.squared_norms(image, rng, adaptive=options.adaptive, trace=True)
        squares.append(torch.stack([square, trace_square]))
    found = _of_probes(kappas, traces if options.trace else None, name, space, options)
    if not measuring or options.probes == 1:
        return found
    kappa, trace = 2 * torch.stack(squares).double().mean(0) / options.probes
    return replace(found, variances=(kappa, trace))


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
        _of_probes(k, t if options.trace else None, "ggn", space, options)
        for k, t, space in zip(kappas, traces, spaces, strict=True)
    ]


def _factors(known: KnownLoss, options: Options, rng: Rng) -> Iterator[Tensor]:
    """Random vectors in the space of the outputs whose second moment is the Hessian of the loss there."""
    hessian, rows = known.hessian(constant=not options.full), known.rows()
    like = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for _ in range(options.probes):
        eps = rng.signs((rows.numel() // rows.shape[-1], rows.shape[-1]), like)
        yield known.from_rows(hessian.factor(eps))


def _quadratic(space: Space, operator: Operator, u: Tensor, options: Options) -> Shares:
    """``<u, H u>`` for each group; with H constant ``2 <u, stop(Hu)> - stop(<u, Hu>)`` has its gradient."""
    if options.full:
        return space.inner(u, space.product(operator, u))
    linear = space.inner(u, space.product(operator, u.detach()).detach())
    return 2 * linear - linear.detach()


def _of_probes(
    kappas: list[Tensor], traces: list[Tensor] | None, name: str, space: Space, options: Options
) -> Contributions:
    where = f"{name} in {space.where}" if space.where else name
    trace = torch.stack(traces) if traces else None
    return Contributions(torch.stack(kappas), trace, f"probe({where}, {options.probes})", False)
