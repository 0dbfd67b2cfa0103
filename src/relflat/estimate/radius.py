"""The finite-radius penalty: the rise of the loss when the features of a layer are moved at random."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from relflat.capture.kinds import kind_of
from relflat.capture.tap import Inject, Tap
from relflat.errors import ConfigError
from relflat.estimate import differences as perturb
from relflat.estimate.choose import Scene, Spec
from relflat.estimate.probes import Contributions
from relflat.rng import Rng


class Rise:
    """``E[L(phi + radius ||phi|| u) - L(phi)]``, the left side of I8 before the limit.

    Args:
        radius: size of the noise relative to the features.
        spec: ``adaptive``, ``normalize`` and ``probes`` are used.
        seed: of the noise.
        tap: the layers whose inputs move, all in one perturbed forward pass.
    """

    def __init__(self, radius: float, spec: Spec, seed: int, tap: Tap) -> None:
        for name, target in tap.layers.items():
            if isinstance(target, nn.Parameter):
                raise ConfigError(
                    f"radius= moves the input of a layer, and {name!r} is a parameter; name a layer"
                )
        self.radius, self.spec, self.seed, self.tap = radius, spec, seed, tap

    def inject(self, draw: int) -> Inject:
        """A change to the layers' inputs, the same for the same draw."""
        rng = Rng(self.seed, draw)

        def move(name: str, x: Tensor) -> Tensor:
            module = self.tap.layers[name]
            assert isinstance(module, nn.Module)
            kind = kind_of(module)
            assert kind is not None
            change = perturb.noise(
                x,
                self.radius,
                rng,
                adaptive=self.spec.adaptive,
                normalize=self.spec.normalize,
                kind=kind,
                module=module,
            )
            return (x + change).to(x.dtype)

        return move

    def __call__(
        self,
        scene: Scene,
        step: int,
        again: Callable[[Inject], Tensor],
        head: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, Contributions]:
        """The rise for this step: from the head alone for an output layer, else from forward passes.

        Args:
            scene: the forward pass and its loss.
            step: number of the step.
            again: the loss of one more forward pass.
            head: the loss of other outputs, for an output layer.
        """
        losses, at_head = [], head is not None and len(scene.calls) == 1
        for k in range(self.spec.probes):
            inject = self.inject(step * self.spec.probes + k)
            moved: Tensor | None = None
            if at_head and scene.outputs is not None:
                call = scene.calls[0]
                phi = call.input().to(torch.promote_types(call.phi.dtype, torch.float32))
                moved = perturb.shifted_outputs(call, scene.outputs, inject(call.layer, phi) - phi)
            if moved is None or head is None:
                at_head = False
                losses.append(again(inject))
            else:
                losses.append(head(moved))
        rises = torch.stack([loss - scene.loss for loss in losses]).reshape(len(losses), -1)
        names = "+".join(dict.fromkeys(c.layer for c in scene.calls))
        return {names: Contributions(rises, None, f"radius({self.radius:g})", False)}
