"""Estimators of kappa from products with the curvature after the layer (identities I3 to I7).

Every estimator returns one number for each probe and group of coupled samples, to be summed over groups:
its mean over probes is kappa, exactly (``exact``) or in expectation (the others). Groups draw independent
directions, so one product serves as many probes as there are samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relflat.curvature.operators import Operator, pull
from relflat.curvature.output_space import Site
from relflat.loss.known import KnownLoss
from relflat.rng import Rng

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
    (_, t, c, m), d = site.shape, site.weight.shape[0]
    if adaptive:
        for k in range(m):
            only_k = torch.zeros_like(site.features)
            only_k[..., k] = 1
            kappas.append(_quadratic(operator, site, site.apply(site.features * only_k), gradient))
    gram_w = site.weight @ site.weight.mT
    for p in range(t if trace or not adaptive else 0):
        for j in range(d):
            basis = torch.zeros((site.shape[0], t, d), dtype=site.weight.dtype, device=site.weight.device)
            basis[:, p, j] = 1
            curved = site.join(operator(site.split(basis)))
            curved = curved if gradient == "full" else curved.detach()
            near = torch.einsum("gscm,gm->gsc", site.features, site.features[:, p, j * c // d])
            across = (site.spread(near) * curved).sum(1)
            kappas += [] if adaptive else [across @ gram_w[:, j]]
            traces.append(across[:, j].detach())
    total = torch.stack(kappas).sum(0)[None]
    return Contributions(total, torch.stack(traces).sum(0)[None] if trace else None, "exact", True)


def in_weight(operator: Operator, site: Site, v: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
    """``H V``, H the curvature in the layer's weight summed over all groups, by way of the layer's outputs (I5)."""
    g, t, c, m = site.shape
    phi = site.features.detach().reshape(g * t, c, m).movedim(1, 0)
    u = (phi @ v.reshape(c, -1, m).mT).movedim(0, 1).reshape(g, t, -1)
    curved = site.join(operator(site.split(u))).detach().reshape(g * t, c, -1).movedim(1, 0)
    return (curved.mT @ phi).flatten(0, 1)


def products_for_exact(site: Site, *, adaptive: bool, trace: bool) -> int:
    """How many products :func:`exact` takes."""
    basis = site.shape[1] * site.weight.shape[0]
    return site.weight.shape[1] + (basis if trace else 0) if adaptive else basis


def sampled(
    operator: Operator,
    site: Site,
    *,
    probes: int,
    adaptive: bool,
    gradient: Gradient,
    trace: bool,
    rng: Rng,
    name: str,
) -> Contributions:
    """Rank-one probes (I6): ``u = (W a)(b . phi)``, a and b Rademacher; diagonal ones (I9) if adaptive."""
    kappas, traces = [], []
    (g, _, _, m), d, like = site.shape, site.weight.shape[0], site.weight
    for _ in range(probes):
        b = rng.signs((g, 1, m), like)
        if adaptive:
            u = site.apply(site.features * b[:, None])
        else:
            along = rng.signs((g, m), like) @ site.weight.mT
            u = site.spread(site.project(b).squeeze(-1)) * along[:, None]
        kappas.append(_quadratic(operator, site, u, gradient))
        if trace:
            s = site.project(rng.signs((g, 1, m), like)).squeeze(-1).detach()
            v = site.spread(s) * rng.signs((g, 1, d), like)
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
    rng: Rng,
    create_graph: bool,
) -> list[Contributions]:
    """Probes in the space of the logits (I7): ``r = S eps`` with ``S S' = A``, one pull-back for all layers.

    With ``g = J' r`` the share of a group is ``||sum_t (W' g_t) phi_t'||_F^2``, never negative.
    """
    calls = [c for s in sites for c in s.calls]
    kappas: list[list[Tensor]] = [[] for _ in sites]
    traces: list[list[Tensor]] = [[] for _ in sites]
    for r in factors(outputs, known, targets, probes=probes, constant=mode != "full", rng=rng):
        pulled = iter(pull([outputs], calls, [r], create_graph=create_graph))
        for i, site in enumerate(sites):
            g = site.join([next(pulled) for _ in site.calls])
            share, around = _squared_norms(site, g, adaptive=adaptive, trace=trace, rng=rng)
            kappas[i].append(share)
            traces[i].append(around)
    return [
        Contributions(torch.stack(k), torch.stack(t) if trace else None, f"probe(ggn, {probes})", False)
        for k, t in zip(kappas, traces, strict=True)
    ]


def factors(
    outputs: Tensor, known: KnownLoss, targets: Tensor, *, probes: int, constant: bool, rng: Rng
) -> Iterator[Tensor]:
    """Random vectors in the space of the outputs whose second moment is the Hessian of the loss there."""
    hessian = known.hessian(outputs.detach() if constant else outputs, targets)
    arranged = known.classes_last(outputs)
    d = arranged.shape[-1]
    like = arranged.new_zeros((), dtype=torch.promote_types(outputs.dtype, torch.float32))
    for _ in range(probes):
        eps = rng.signs((arranged.numel() // d, d), like)
        yield known.classes_back(hessian.factor(eps).reshape(arranged.shape)).to(outputs.dtype)


def curved(operator: Operator, site: Site, rng: Rng) -> bool:
    """Whether a random direction has a product other than zero, or there is no gradient to begin with."""
    u = rng.signs((*site.shape[:2], site.weight.shape[0]), site.weight)
    if bool(site.join(operator(site.split(u))).any()):
        return True
    slope = operator.slope_at_calls()
    return not bool(site.join(slope).any())


def coupled(operator: Operator, site: Site, rng: Rng) -> bool:
    """Whether samples influence each other after the layer (BatchNorm in training mode, contrastive losses).

    A direction that is zero on some samples has a product that is zero there too, exactly, unless they are
    coupled. Any two samples are told apart by one of the directions. Cost: ``log2 g`` products.
    """
    g, t = site.shape[:2]
    for own in _bipartitions(g, site.weight.device):
        u = rng.signs((g, t, site.weight.shape[0]), site.weight)
        u[~own] = 0
        response = site.join(operator(site.split(u))).detach().abs()
        if response[~own].max() > _LEAK * response[own].max():
            return True
    return False


def coupled_outputs(outputs: Tensor, site: Site, rng: Rng) -> bool:
    """The same question by first derivatives: do outputs of some samples depend on features of others?

    Cost: ``2 log2 g`` backward passes of the tail.
    """
    g = site.shape[0]
    if g < 2:
        return False
    if outputs.ndim == 0 or outputs.shape[0] != g:
        return True  # no telling which output belongs to which sample; one group is right in any case
    for half in _bipartitions(g, outputs.device):
        for own in (half, ~half):
            r = rng.signs(tuple(outputs.shape), outputs)
            r[~own] = 0
            response = site.join(pull([outputs], site.calls, [r], create_graph=False)).abs()
            if response[~own].max() > _LEAK * response[own].max():
                return True
    return False


def _bipartitions(g: int, device: torch.device) -> Iterator[Bool[Tensor, " g"]]:
    """Splits of g samples in two, by the binary digits of their numbers: any two are separated by one."""
    numbers = torch.arange(g, device=device)
    for digit in range((g - 1).bit_length()):
        yield numbers.bitwise_right_shift(digit).bitwise_and(1).bool()


def _quadratic(operator: Operator, site: Site, u: Float[Tensor, "g t d"], gradient: Gradient) -> Tensor:
    """``<u, H u>`` for each group; unless ``full``, H is constant: ``2 <u, stop(Hu)> - stop(<u, Hu>)``."""
    curved = site.join(operator(site.split(u if gradient == "full" else u.detach())))
    if gradient == "full":
        return (u * curved).sum((1, 2))
    linear = (u * curved.detach()).sum((1, 2))
    return 2 * linear - linear.detach()


_FEW_POSITIONS = 16
_SKETCH = 8
_LEAK = 1e-6  # what counts as exactly zero, relative to the response of a sample itself


def _squared_norms(
    site: Site, g: Float[Tensor, "g t d"], *, adaptive: bool, trace: bool, rng: Rng
) -> tuple[Tensor, Tensor]:
    """``||W' G||_F^2`` and ``||G||_F^2`` of each group's ``G = sum_t g_t phi_t'``.

    Exact through Gram matrices of the positions where those are few. Else from the images ``G b`` of
    ``_SKETCH`` independent Rademacher vectors b a group, as ``E_b ||W' G b||^2`` is the same number.
    """
    groups, t, c, m = site.shape
    if adaptive:
        y = torch.einsum("gtco,com->gtcm", _by_group(g, c), site.weight.reshape(c, -1, m))
        kappa = (y * site.features).sum((1, 2)).square().sum(-1)
        adaptive_trace = _gram_trace(site, g.detach()) if trace else kappa
        return kappa, adaptive_trace
    if t * c <= _FEW_POSITIONS:
        y = torch.einsum("gtco,com->gtcm", _by_group(g, c), site.weight.reshape(c, -1, m)).flatten(1, 2)
        phi = site.features.flatten(1, 2)
        kappa = _gram_product(y, phi)
        return kappa, _gram_trace(site, g.detach()) if trace else kappa
    b = rng.signs((groups, _SKETCH, m), site.weight)
    seen = torch.einsum("gtcq,gtco->gqco", site.project(b), _by_group(g, c)).flatten(2)
    kappa = (seen @ site.weight).square().sum((1, 2)) / _SKETCH
    return kappa, seen.detach().square().sum((1, 2)) / _SKETCH


def _by_group(g: Float[Tensor, "g t d"], c: int) -> Float[Tensor, "g t c o"]:
    return g.reshape(*g.shape[:-1], c, g.shape[-1] // c)


def _gram_product(x: Float[Tensor, "g p a"], y: Float[Tensor, "g p b"]) -> Float[Tensor, " g"]:
    """``||sum_p x_p y_p'||_F^2``."""
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * y.square().sum((1, 2))
    return ((x @ x.mT) * (y @ y.mT)).sum((1, 2))


def _gram_trace(site: Site, g: Float[Tensor, "g t d"]) -> Float[Tensor, " g"]:
    """``sum_c ||sum_t g_tc phi_tc'||_F^2``: channel groups have features of their own."""
    c = site.shape[2]
    by_group, phi = _by_group(g, c), site.features.detach()
    return torch.stack([_gram_product(by_group[:, :, i], phi[:, :, i]) for i in range(c)]).sum(0)
