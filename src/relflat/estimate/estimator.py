"""From a scene to contributions: every layer gets its method of ``methods.py``, where one is added."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from relflat.capture.graph import ancestors, leaves_between, singular
from relflat.capture.resolve import Target
from relflat.capture.tap import Tap
from relflat.curvature.operators import differentiate
from relflat.errors import ConfigError, GraphError, LayerError, SecondDerivativeError, warn
from relflat.estimate.contributions import Contributions
from relflat.estimate.methods import Method, choose, named
from relflat.estimate.radius import increase
from relflat.estimate.scene import Scene
from relflat.estimate.subject import Memory, Subject
from relflat.options import Options
from relflat.rng import Rng

Around = Callable[[], AbstractContextManager[Any]]
_AVOIDABLE = ("scaled_dot_product", "compile", "aot_autograd", "donated buffers")
"""Parts of what is said of kernels that a plain pass does without."""


class Estimator:
    """Estimates kappa of layers in scenes, one after the other; remembers what it found out about their model."""

    def __init__(self, options: Options, seed: int) -> None:
        self.options, self.seed, self.memory = options, seed, Memory()
        self.plain = False  # whether compiled code and fused attention are kept out
        self._wanted = named(options.method)

    def must_suit(self, tap: Tap) -> None:
        """Refuse layers that do not go with the options, by name; ``"output"`` and globs may be settled later."""
        options, wanted, layers = self.options, self.options.layers_per_step, tap.layers
        if wanted is not None and wanted > len(layers):
            raise ConfigError(
                f"layers_per_step={wanted}: a number from 1 to {len(layers)} is needed, as the layers are "
                f"{list(layers)}; None takes all of them"
            )
        if tap.unsettled:
            return
        if options.normalize_features or options.radius is not None:
            tap.must_have_features("normalize_features" if options.normalize_features else "radius=")
        for name in filter(lambda name: _frozen(layers[name]), layers) if options.gradient == "weights" else ():
            raise LayerError(
                f"gradient='weights' reaches the weight of layer {name!r} only, and that is frozen "
                "(requires_grad=False); unfreeze it or use gradient='full'"
            )

    @property
    def repeats(self) -> bool:
        """Whether forward passes are run once more, so that their random state is needed."""
        return self.options.radius is not None or self._wanted is named("finite_difference")

    @property
    def may_repeat(self) -> bool:
        """Whether finite differences stand in where an operation has no second derivative."""
        o = self.options
        return (o.method, o.curvature, o.gradient, o.radius) == ("auto", "hessian", "full", None)

    def __call__(
        self, scene: Scene, step: int, options: Options | None = None, around: Around = nullcontext
    ) -> dict[str, Contributions]:
        """The contributions to kappa of every layer of the scene, each with its method.

        Seed and step determine the probes; ``options`` may ask for another number of them. Derivatives are taken
        within a context of ``around``.
        """
        options = options or self.options
        if options.radius is not None:
            with around():
                return {"+".join(scene.layers): increase(scene, options, self.seed, step)}
        found = self._run(scene, step, options)
        rest = [layer for layer in scene.layers if layer not in found]
        if not rest:
            return found
        with around():
            others = self._differentiated(scene, step, options, rest)
        return {layer: found[layer] if layer in found else others[layer] for layer in scene.layers}

    def _differentiated(
        self, scene: Scene, step: int, options: Options, layers: Collection[str]
    ) -> dict[str, Contributions]:
        if self.plain and not scene.plain and scene.replay is not None:
            scene = scene.plainly()
        try:
            return self._run(scene, step, options, layers)
        except SecondDerivativeError as error:
            found = None if self.plain else self._plainly(scene, step, options, layers, error)
            if found is not None:
                return found
            if not self.may_repeat or scene.replay is None:
                raise SecondDerivativeError(f"{error}; {_remedy(scene, options, str(error))}") from error
            warn(
                "kappa is estimated by finite differences from now on (noisy, and wrong where the network has kinks "
                f"such as ReLU within a step), as {error}"
            )
            self._wanted = named("finite_difference")
            return self._run(scene, step, options, layers)

    def _plainly(
        self, scene: Scene, step: int, options: Options, layers: Collection[str], error: SecondDerivativeError
    ) -> dict[str, Contributions] | None:
        """By the pass run once more without compiled and fused kernels, from now on; None if that fails."""
        if scene.replay is None or len(scene.replay.forwards) != 1:
            return None
        if not any(kernel in str(error) for kernel in _AVOIDABLE):
            return None
        try:
            found = self._run(scene.plainly(), step, options, layers)
        except GraphError:  # no second derivative there either, or the criterion's input cannot be had again
            return None
        self.go_plain(error)
        return found

    def go_plain(self, error: SecondDerivativeError) -> None:
        """From now on look at passes without compiled code and fused attention only, and say so."""
        self.plain = True
        again = "" if self.options.measuring else ", in a forward pass of its own for each penalty"
        warn(
            "kappa is computed without compiled code and with the math backend of attention from now on"
            f"{again}, as {error}"
        )

    def subjects(self, scene: Scene, options: Options | None = None, **how: Any) -> Iterator[Subject]:
        """The layers of a scene; ``how`` as for :class:`Subject`."""
        for layer in scene.layers:
            yield Subject(scene, layer, options or self.options, self.memory, self.seed, **how)

    def _run(
        self, scene: Scene, step: int, options: Options, layers: Collection[str] | None = None
    ) -> dict[str, Contributions]:
        """Those of the layers; without any named, of all that have a method at once, without derivatives."""
        by_method: dict[Method, list[Subject]] = {}
        found: dict[str, Contributions] = {}
        rng = Rng(self.seed, step)
        device = scene.loss.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            for subject in self.subjects(scene, options):
                wanted = layers is None or subject.layer in layers
                method = choose(subject, self._wanted, at_once=layers is None) if wanted else None
                if method is not None:
                    by_method.setdefault(method, []).append(subject)
            for method, subjects in by_method.items():
                found |= method.run(subjects, rng)
        if options.full:
            asked = [s for method, mine in by_method.items() if method.asked for s in mine]
            for layer in lost_gradients(asked, found):
                found[layer] = replace(found[layer], lost=True)
        return found


def _frozen(target: Target) -> bool:
    parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
    return not any(p.requires_grad for p in parameters if p.ndim > 1)


def lost_gradients(subjects: Sequence[Subject], found: Mapping[str, Contributions]) -> list[str]:
    """The layers whose kappa has a gradient that is not finite in their outputs or in what comes after them.

    Asked once a layer, and each time where an operation after it has derivatives that are no numbers at 0; all
    layers at once, and one by one only where that is not finite.
    """
    asked = [s for s in subjects if s.key not in s.memory.finite and found[s.layer].kappa.requires_grad]
    none = not asked or _finite_gradients(asked, found)
    lost = [] if none else [s for s in asked if not _finite_gradients([s], found)]
    for s in asked:
        if s not in lost and not any(map(singular, ancestors(s.scene.loss.grad_fn, without=s.ends()))):
            s.memory.finite.add(s.key)
    return [s.layer for s in lost]


def _finite_gradients(subjects: Sequence[Subject], found: Mapping[str, Contributions]) -> bool:
    edges = [c.edge for s in subjects for c in s.space.calls if c.edge is not None]
    leaves = {id(x): x for s in subjects for x in leaves_between(s.scene.loss.grad_fn, s.ends())}
    inputs: list[Any] = [*edges, *leaves.values()]
    gradients = differentiate([found[s.layer].kappa.sum() for s in subjects], inputs, None, create_graph=False)
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


def _remedy(scene: Scene, options: Options, text: str) -> str:
    """What can be done where something has no second derivative: only what exists and helps there."""
    known, ggn, again = scene.known is not None, options.curvature == "ggn", scene.replay is not None
    ways = {
        "run the model under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)": "scaled_dot_product" in text,
        "compile what comes before the layer only": "compile" in text,
        "gradient='frozen'": ggn and options.full and (known or "loss" in text),
        "method='probe'": ggn and options.measuring and known,
        "curvature='hessian' with method='finite_difference'": again,
        "radius=, which needs no derivative": again and not options.measuring,
    }
    return f"use {', or '.join([way for way, helps in ways.items() if helps] or ['a layer after that operation'])}"
