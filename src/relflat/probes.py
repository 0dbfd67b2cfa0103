"""Estimators of kappa from products with the curvature after the layer (identities I3 to I7).

Every estimator returns one number for each probe and group of coupled samples, to be summed over groups:
its mean over probes is kappa, exactly (``exact``) or in expectation (the others). Groups draw independent
directions, so one product serves as many probes as there are samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from relflat.losses import KnownLoss
from relflat.operators import Operator, pull
from relflat.rng import rademacher
from relflat.site import Site

Gradient = Literal["full", "frozen", "weights"]
Values = Float[Tensor, "k g"]


@dataclass(frozen=True, eq=False)
class Contributions:
    """Shares of kappa and of ``Tr H``, by probe and group.

    Attributes:
        kappa: as described in the module.
        trace: likewise for ``Tr H``, or None if it was not asked for.
        method: what was done, in words.
        exact: whether a single row holds the exact value.
    """

    kappa: Values
    trace: Values | None
    method: str
    exact: bool


def exact(
    operator: Operator, site: Site, *, adaptive: bool, gradient: Gradient, trace: bool
) -> Contributions:
    """Sum over a basis (I3): one product for each pair of position and output, or each feature if adaptive.

    ``kappa = sum_{t,j} < (Phi Phi' e_t) (x) (W W' e_j), H (e_t (x) e_j) >`` for every group, phi and W
    entering on the left only.
    """
    kappas, traces = [], []
    if adaptive:
        for t in range(site.phi.shape[-1]):
            u = site.phi[..., t, None] * site.weight[:, t]
            kappas.append(_quadratic(operator, site, u, gradient))
    gram_w = site.weight @ site.weight.mT
    if not adaptive or trace:
        for t, j, basis in _basis(site):
            curved = site.join(operator(site.split(basis)))
            curved = curved if gradient == "full" else curved.detach()
            across = torch.einsum("gsm,gm,gsd->gd", site.phi, site.phi[:, t], curved)
            kappas += [] if adaptive else [across @ gram_w[:, j]]
            traces.append(across[:, j])
    total = torch.stack(kappas).sum(0)[None]
    return Contributions(total, torch.stack(traces).sum(0)[None] if trace else None, "exact", True)


def products_for_exact(site: Site, *, adaptive: bool, trace: bool) -> int:
    """How many products :func:`exact` takes."""
    basis = site.phi.shape[1] * site.weight.shape[0]
    return site.weight.shape[1] + (basis if trace else 0) if adaptive else basis


def sampled(
    operator: Operator,
    site: Site,
    *,
    probes: int,
    adaptive: bool,
    gradient: Gradient,
    trace: bool,
    rng: torch.Generator,
    name: str,
) -> Contributions:
    """Rank-one probes (I6): ``u = (W a)(b . phi)``, a and b Rademacher; diagonal ones (I9) if adaptive."""
    kappas, traces = [], []
    (g, _, m), d = site.phi.shape, site.weight.shape[0]
    for _ in range(probes):
        b = rademacher((g, m), site.phi, rng)
        if adaptive:
            u = (site.phi * b[:, None]) @ site.weight.mT
        else:
            a = rademacher((g, m), site.phi, rng)
            u = torch.einsum("gtm,gm,gd->gtd", site.phi, b, a @ site.weight.mT)
        kappas.append(_quadratic(operator, site, u, gradient))
        if trace:
            signs = rademacher((g, d), site.phi, rng)
            v = torch.einsum("gtm,gm,gd->gtd", site.phi, b, signs)
            traces.append(_quadratic(operator, site, v, "full").detach())
    method = f"probe({name}, {probes})"
    return Contributions(torch.stack(kappas), torch.stack(traces) if trace else None, method, False)


def ggn_factored(
    sites: Sequence[Site],
    outputs: Float[Tensor, "..."],
    known: KnownLoss,
    targets: Tensor,
    *,
    probes: int,
    adaptive: bool,
    mode: Gradient,
    trace: bool,
    rng: torch.Generator,
    create_graph: bool,
) -> list[Contributions]:
    """Probes in the space of the logits (I7): ``r = S eps`` with ``S S' = A``, then one pull-back for all layers.

    With ``g = J' r`` the share of a group is ``||sum_t (W' g_t) phi_t'||_F^2``, never negative.
    """
    hessian = known.hessian(outputs, targets)
    hessian = hessian if mode == "full" else hessian.detach()
    arranged = known.classes_last(outputs)
    calls = [c for s in sites for c in s.calls]
    kappas: list[list[Tensor]] = [[] for _ in sites]
    traces: list[list[Tensor]] = [[] for _ in sites]
    for _ in range(probes):
        eps = rademacher((arranged.numel() // arranged.shape[-1], arranged.shape[-1]), sites[0].phi, rng)
        r = known.classes_back(hessian.factor(eps).reshape(arranged.shape)).to(outputs.dtype)
        pulled = iter(pull([outputs], calls, [r], create_graph=create_graph and mode == "full"))
        for i, site in enumerate(sites):
            g = site.join([next(pulled) for _ in site.calls])
            kappas[i].append(_squared_norm(g @ site.weight, site.phi, diagonal=adaptive))
            if trace:
                traces[i].append(_squared_norm(g.detach(), site.phi.detach()))
    return [
        Contributions(torch.stack(k), torch.stack(t) if trace else None, f"probe(ggn, {probes})", False)
        for k, t in zip(kappas, traces, strict=True)
    ]


def coupled(operator: Operator, site: Site, rng: torch.Generator) -> bool:
    """Whether samples influence each other after the layer (BatchNorm in training mode, contrastive losses).

    A direction that is zero on half of the samples has a product that is zero there too, exactly, unless they
    are coupled. Cost: one product.
    """
    groups = site.phi.shape[0]
    if groups < 2:
        return False
    shape = (*site.phi.shape[:2], site.weight.shape[0])
    u = rademacher(shape, site.phi, rng)
    u[groups // 2 :] = 0
    response = site.join(operator(site.split(u))).detach().abs()
    leak, own = response[groups // 2 :].max(), response[: groups // 2].max()
    return bool(leak > 16 * torch.finfo(site.calls[0].output.dtype).eps * own)


def coupled_outputs(outputs: Tensor, site: Site, rng: torch.Generator) -> bool:
    """The same question by first derivatives alone: do outputs of one half depend on the other half's features?

    Cost: two backward passes of the tail.
    """
    groups = site.phi.shape[0]
    if groups < 2:
        return False
    if outputs.ndim == 0 or outputs.shape[0] != groups:
        return True  # no telling which output belongs to which sample; one group is right in any case
    halves = slice(0, groups // 2), slice(groups // 2, groups)
    for own, other in (halves, halves[::-1]):
        r = rademacher(tuple(outputs.shape), outputs, rng)
        r[other] = 0
        response = site.join(pull([outputs], site.calls, [r], create_graph=False)).abs()
        if response[other].max() > 16 * torch.finfo(outputs.dtype).eps * response[own].max():
            return True
    return False


def _quadratic(operator: Operator, site: Site, u: Float[Tensor, "g t d"], gradient: Gradient) -> Tensor:
    """``<u, H u>`` for each group; unless ``full``, H is constant: ``2 <u, stop(Hu)> - stop(<u, Hu>)``."""
    curved = site.join(operator(site.split(u if gradient == "full" else u.detach())))
    if gradient == "full":
        return (u * curved).sum((1, 2))
    linear = (u * curved.detach()).sum((1, 2))
    return 2 * linear - linear.detach()


def _squared_norm(
    x: Float[Tensor, "g t a"], phi: Float[Tensor, "g t m"], *, diagonal: bool = False
) -> Float[Tensor, " g"]:
    """``||sum_t x_t phi_t'||_F^2`` for each group, or of its diagonal only (a = m)."""
    if diagonal:
        return (x * phi).sum(1).square().sum(-1)
    (_, t, a), m = x.shape, phi.shape[-1]
    if t * (a + m) <= 2 * a * m:
        return ((x @ x.mT) * (phi @ phi.mT)).sum((1, 2))
    return (x.mT @ phi).square().sum((1, 2))


def _basis(site: Site) -> Iterator[tuple[int, int, Float[Tensor, "g t d"]]]:
    shape = (*site.phi.shape[:2], site.weight.shape[0])
    for t in range(shape[1]):
        for j in range(shape[2]):
            e = torch.zeros(shape, dtype=site.phi.dtype, device=site.phi.device)
            e[:, t, j] = 1
            yield t, j, e
