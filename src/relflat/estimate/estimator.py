"""From a scene to contributions: every layer gets its method of ``methods.py``, where one is added."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from relflat.errors import GraphError, SecondDerivativeError, warn
from relflat.estimate.contributions import Contributions
from relflat.estimate.lost import lost_gradients
from relflat.estimate.methods import Method, choose, choose_at_once, named
from relflat.estimate.radius import increase
from relflat.estimate.scene import Scene
from relflat.estimate.subject import Memory, Subject
from relflat.options import Options
from relflat.rng import Rng

Around = Callable[[], AbstractContextManager[Any]]
Choice = Callable[[Subject, Method | None], Method | None]
_AVOIDABLE = ("scaled_dot_product", "compile", "aot_autograd", "donated buffers")
"""Parts of what is said of kernels that a plain pass does without."""


class Estimator:
    """Estimates kappa of layers in scenes, one after the other; remembers what it found out about their model."""

    def __init__(self, options: Options, seed: int) -> None:
        self.options, self.seed, self.memory = options, seed, Memory()
        self.plain = False  # whether compiled code and fused attention are kept out
        self._wanted = named(options.method)

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
        found = self._run(scene, step, options, choose_at_once)
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
            return self._run(scene, step, options, choose, layers)
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
            return self._run(scene, step, options, choose, layers)

    def _plainly(
        self, scene: Scene, step: int, options: Options, layers: Collection[str], error: SecondDerivativeError
    ) -> dict[str, Contributions] | None:
        """By the pass run once more without compiled and fused kernels, from now on; None if that fails."""
        if scene.replay is None or len(scene.replay.forwards) != 1:
            return None
        if not any(kernel in str(error) for kernel in _AVOIDABLE):
            return None
        try:
            found = self._run(scene.plainly(), step, options, choose, layers)
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
        self, scene: Scene, step: int, options: Options, chosen: Choice, layers: Collection[str] | None = None
    ) -> dict[str, Contributions]:
        """Those of the layers, by default all, for which a method is chosen."""
        by_method: dict[Method, list[Subject]] = {}
        found: dict[str, Contributions] = {}
        rng = Rng(self.seed, step)
        device = scene.loss.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            for subject in self.subjects(scene, options):
                method = chosen(subject, self._wanted) if layers is None or subject.layer in layers else None
                if method is not None:
                    by_method.setdefault(method, []).append(subject)
            for method, subjects in by_method.items():
                found |= method.run(subjects, rng)
        if options.full:
            asked = [s for method, mine in by_method.items() if method.asked for s in mine]
            for layer in lost_gradients(asked, found):
                found[layer] = replace(found[layer], lost=True)
        return found


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
