"""The methods by which kappa is computed: the README's table as code.

Each says why it does not apply to a layer of a scene, or computes it. ``"auto"`` takes the first that applies; one
asked for by name raises its reason. To add a method, write a :class:`Method` and :func:`register` it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from relflat.capture.matrix import Matrix
from relflat.errors import ConfigError, LossError, RelflatError
from relflat.estimate import closed_form, products
from relflat.estimate.contributions import Contributions
from relflat.estimate.differences import finite_difference
from relflat.estimate.subject import Subject
from relflat.options import Options
from relflat.rng import Rng

Found = dict[str, Contributions]


@dataclass(frozen=True)
class Method:
    """One way to kappa.

    Attributes:
        name: in ``method=``.
        why_not: the reason why it does not apply to a layer, or None if it does.
        run: kappa of all the layers that it was chosen for.
        automatic: whether ``"auto"`` may take it.
        error: what is raised with the reason where it was asked for by name.
    """

    name: str
    why_not: Callable[[Subject], str | None]
    run: Callable[[Sequence[Subject], Options, Rng], Found]
    automatic: bool = True
    error: type[RelflatError] = LossError


_METHODS: list[Method] = []


def register(method: Method) -> Method:
    """Add a method, or put one in the place of that of the same name; ``"auto"`` asks it last.

    Example:
        >>> from relflat.estimate.methods import named
        >>> register(named("exact")).name
        'exact'
    """
    same = [i for i, m in enumerate(_METHODS) if m.name == method.name]
    if same:
        _METHODS[same[0]] = method
    else:
        _METHODS.append(method)
    return method


def named(name: str) -> Method | None:
    """The method of that name; None for ``"auto"`` and for ``"xtrace"``, which is made of whole sweeps over data.

    Raises:
        ConfigError: naming the choices.
    """
    found = {m.name: m for m in _METHODS}
    if name not in found and name not in ("auto", "xtrace"):
        raise ConfigError(f"method={name!r}: choose one of {['auto', *found, 'xtrace']}")
    return found.get(name)


def choose(subject: Subject, wanted: Method | None) -> Method:
    """The method for one layer.

    Args:
        subject: the layer.
        wanted: the one asked for; None for the first that applies.

    Raises:
        LossError: if the one asked for does not apply, with its reason.
    """
    if wanted is None:
        return next(m for m in _METHODS if m.automatic and m.why_not(subject) is None)
    reason = wanted.why_not(subject)
    if reason is not None:
        raise wanted.error(
            f"no {wanted.name.replace('_', ' ')} for layer {subject.layer!r}: {reason}; use method='auto'"
        )
    return wanted


# -- a closed form: output layer, known loss -----------------------------------------------------------------


def _why_no_closed_form(subject: Subject) -> str | None:
    return closed_form.why_not(subject.calls, subject.scene.outputs, subject.scene.known)


def _closed_form(subjects: Sequence[Subject], options: Options, rng: Rng) -> Found:
    found = {}
    for subject in subjects:
        scene, space = subject.scene, subject.output_space()
        assert scene.known is not None
        assert scene.outputs is not None
        assert scene.targets is not None
        outputs = scene.outputs if options.full else scene.outputs.detach()
        hessian = closed_form.logit_hessian(space, scene.known, outputs, scene.targets)
        energy = closed_form.squared_features(space)
        kappa = closed_form.kappa_rows(energy, space.weight, hessian, adaptive=options.adaptive)[None]
        trace = closed_form.trace_rows(energy, hessian)[None] if options.trace else None
        found[subject.layer] = Contributions(kappa, trace, "closed_form", True)
    return found


# -- a sum over a basis: few products -----------------------------------------------------------------------


def _why_no_exact_sum(subject: Subject) -> str | None:
    options = subject.options
    if options.method == "exact":
        return None
    if subject.known is not None:
        return "probes of a known loss take one pull-back for all layers"
    if not (options.measuring or subject.at_end):
        return "in training only output layers are summed, whose products cost nothing but the loss"
    count = subject.space.products_for_exact(adaptive=options.adaptive, trace=options.trace)
    return None if count <= options.exact_up_to else f"it takes {count} products"


def _exact(subjects: Sequence[Subject], options: Options, rng: Rng) -> Found:
    found = {}
    for subject in subjects:
        operator = subject.operator  # first, as it says what is missing of the loss
        found[subject.layer] = products.exact(subject.space, operator, options)
    return found


# -- random directions: everything that can be differentiated twice ------------------------------------------


def _probe(subjects: Sequence[Subject], options: Options, rng: Rng) -> Found:
    found = {}
    for subject in [s for s in subjects if s.known is None]:
        operator = subject.operator
        name = "hessian" if subject.at_end else options.curvature
        found[subject.layer] = products.sampled(subject.space, operator, options, rng, name)
    together = [s for s in subjects if s.known is not None]
    if together:
        scene = together[0].scene
        assert scene.known is not None
        assert scene.outputs is not None
        assert scene.targets is not None
        spaces = [s.space for s in together]
        parts = products.factored(spaces, scene.outputs, scene.known, scene.targets, options, rng)
        found |= {space.layer: part for space, part in zip(spaces, parts, strict=True)}
    return found


# -- finite differences: everything that can be run again ----------------------------------------------------


def _why_no_differences(subject: Subject) -> str | None:
    if subject.scene.replay is None:
        return "penalty(loss) cannot compute the loss of a perturbed pass (use criterion(outputs, targets))"
    return None


def _differences(subjects: Sequence[Subject], options: Options, rng: Rng) -> Found:
    found = {}
    with torch.set_grad_enabled(not options.measuring):
        for subject in subjects:
            scene, matrix = subject.scene, Matrix.of(subject.layer, subject.target)
            assert scene.replay is not None
            found[subject.layer] = finite_difference(
                scene.replay, scene.loss, matrix, subject.scale, options, rng
            )
    return found


register(Method("closed_form", _why_no_closed_form, _closed_form))
register(Method("exact", _why_no_exact_sum, _exact))
register(Method("probe", lambda subject: None, _probe))
register(Method("finite_difference", _why_no_differences, _differences, automatic=False, error=ConfigError))
