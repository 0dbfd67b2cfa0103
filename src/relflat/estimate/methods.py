"""The methods by which kappa is computed: the table of methods as code.

Each says why it does not apply to a layer of a scene, or computes it. ``"auto"`` takes the first that applies; one
asked for by name raises its reason. To add a method, write a :class:`Method` and :func:`register` it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from relflat.errors import ConfigError, LossError
from relflat.estimate import closed_form, products
from relflat.estimate.contributions import Contributions
from relflat.estimate.differences import finite_difference
from relflat.estimate.subject import Subject, joint_operator
from relflat.rng import Rng


@dataclass(frozen=True)
class Method:
    """One way to kappa.

    Attributes:
        name: in ``method=``.
        why_not: the reason why it does not apply to a layer, or None if it does.
        run: kappa of all the layers that it was chosen for.
        automatic: whether ``"auto"`` may take it.
        differentiates: whether it, or finding out whether it applies, takes derivatives.
        asked: whether the gradient of its kappa may be no number, so that it must be asked for.
    """

    name: str
    why_not: Callable[[Subject], str | None]
    run: Callable[[Sequence[Subject], Rng], dict[str, Contributions]]
    automatic: bool = True
    differentiates: bool = True
    asked: bool = True


_METHODS: dict[str, Method] = {}
_EXACT_UP_TO = {False: 16, True: 64}  # products that "auto" prefers to probes, in training and in measuring


def register(method: Method) -> Method:
    """Add a method, which ``"auto"`` asks last, or put one in the place of that of the same name."""
    _METHODS[method.name] = method
    return method


def named(name: str) -> Method | None:
    """The method of that name; None for ``"auto"``, and for ``"xtrace"``, which is made of whole sweeps over data.

    Raises:
        ConfigError: naming the choices.
    """
    if name not in _METHODS and name not in ("auto", "xtrace"):
        raise ConfigError(f"method={name!r}: choose one of {['auto', *_METHODS, 'xtrace']}")
    return _METHODS.get(name)


def choose(subject: Subject, wanted: Method | None, *, at_once: bool) -> Method | None:
    """The method for one layer: the one wanted, or for None the first that applies.

    None if it is wanted ``at_once`` and a derivative needs to be taken to find it, or for kappa.

    Raises:
        LossError: the one wanted does not apply, with its reason.
    """
    for method in [m for m in _METHODS.values() if m.automatic] if wanted is None else [wanted]:
        if at_once and method.differentiates:
            return None
        reason = method.why_not(subject)
        if reason is None:
            return method
        if wanted is not None:
            name = wanted.name.replace("_", " ")
            raise LossError(f"no {name} for layer {subject.layer!r}: {reason}; use method='auto'")
    return None


def _why_no_closed_form(subject: Subject) -> str | None:
    if subject.scene.known is not None and subject.calls and subject.in_weight:
        return "the loss depends on its weight in other ways than by its outputs too"
    return closed_form.why_not(subject.calls, subject.scene.known)


def _closed_form(subjects: Sequence[Subject], rng: Rng) -> dict[str, Contributions]:
    found = {}
    for s in subjects:
        assert s.scene.known is not None
        hessian = closed_form.by_rows(s.calls[0], s.scene.known.hessian(constant=not s.options.full))
        found[s.layer] = closed_form.closed_form(s.output_space(), hessian, s.options)
    return found


def _why_no_exact_sum(subject: Subject) -> str | None:
    options = subject.options
    if options.method == "exact":
        return None
    if subject.factors is not None and options.curvature == "ggn":
        return "probes of a known loss take one pull-back for all layers"
    if not (options.measuring or subject.last):
        return "in training only output layers are summed, whose products cost nothing but the loss"
    count = subject.space.products_for_exact(adaptive=options.adaptive, trace=options.trace)
    return None if count <= _EXACT_UP_TO[options.measuring] else f"it takes {count} products"


def _exact(subjects: Sequence[Subject], rng: Rng) -> dict[str, Contributions]:
    # operators first, as they say what is missing of the loss
    return {s.layer: products.exact(s.operator, s.space, s.options) for s in subjects}


def _probe(subjects: Sequence[Subject], rng: Rng) -> dict[str, Contributions]:
    alone = [s for s in subjects if s.factors is None]
    if subjects[0].options.measuring:
        found = _measured(alone, rng)
    else:
        found = {s.layer: products.sampled(s.operator, s.space, s.options, rng, _name(s)) for s in alone}
    together = [s for s in subjects if s.factors is not None]
    if together:
        known, options = together[0].factors, together[0].options
        assert known is not None
        parts = products.factored([s.space for s in together], known, options, rng)
        found |= {s.layer: part for s, part in zip(together, parts, strict=True)}
    return found


def _measured(subjects: Sequence[Subject], rng: Rng) -> dict[str, Contributions]:
    joint = [s for s in subjects if s.options.curvature == "hessian"]
    found: dict[str, Contributions] = {}
    for mine in filter(None, [joint, *([s] for s in subjects if s not in joint)]):
        spaces, options = [s.space for s in mine], mine[0].options
        parts = products.measured(joint_operator(mine), spaces, options, rng, _name(mine[0]))
        found |= {s.layer: part for s, part in zip(mine, parts, strict=True)}
    for s in [s for s in joint if not bool(found[s.layer].kappa.any())]:
        _ = s.operator  # refuses a layer that the loss has no curvature in, or warns of it
    return found


def _name(subject: Subject) -> str:
    return "hessian" if subject.at_end else subject.options.curvature


def _why_no_differences(subject: Subject) -> str | None:
    return "its loss cannot be computed for a perturbed pass" if subject.scene.replay is None else None


def _differences(subjects: Sequence[Subject], rng: Rng) -> dict[str, Contributions]:
    found = {}
    for s in subjects:
        assert s.scene.replay is not None
        with torch.set_grad_enabled(not s.options.measuring):
            found[s.layer] = finite_difference(s.scene.replay, s.scene.loss, s.matrix, s.scale, s.options, rng)
    return found


register(Method("closed_form", _why_no_closed_form, _closed_form, differentiates=False, asked=False))
register(Method("exact", _why_no_exact_sum, _exact))
register(Method("probe", lambda subject: None, _probe))
register(Method("finite_difference", _why_no_differences, _differences, automatic=False, asked=False))
