"""The finite-radius penalty: how much the loss grows when the features of layers move at random.

``E[L(phi + radius ||phi|| u) - L(phi)]`` is the feature robustness of Petzka et al. (Def. 2), which is
``radius^2 / (2 m) kappa`` to second order (I8). It needs no derivative of the loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relflat.capture.calls import same_values
from relflat.capture.kinds import kind_of
from relflat.capture.resolve import supported_layers
from relflat.capture.tap import Tap
from relflat.curvature.scales import divisor, std_of_rows
from relflat.errors import ConfigError
from relflat.estimate.contributions import Contributions
from relflat.estimate.scene import Scene
from relflat.options import Options
from relflat.rng import Rng


@dataclass(frozen=True, eq=False)
class Noise:
    """A random change of a layer's input: ``radius ||phi||`` times a unit vector uniform on the sphere.

    With several positions in a sample (tokens, pixels) the noise is independent at each, with the root mean
    square of the sample's ``||phi||`` as scale. If adaptive, ``radius * phi * eps`` with eps standard normal:
    Gaussian dropout of variance ``radius^2``. If normalised, the same for features divided by their standard
    deviation over the batch, without those (for convolutions: channels) that do not vary in it.
    """

    radius: float
    rng: Rng
    adaptive: bool = False
    normalize: bool = False

    @classmethod
    def of(cls, options: Options, seed: int, draw: int) -> "Noise":
        """That of FAM's options, the same for the same draw."""
        assert options.radius is not None
        return cls(options.radius, Rng(seed, draw), options.adaptive, options.normalize_features)

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input with the change, for :class:`relflat.capture.tap.Tap` to inject."""
        return (x + self.change(module, x)).to(x.dtype)

    def change(self, module: nn.Module, x: Tensor) -> Tensor:
        """The change alone, in float32 or float64.

        Raises:
            ConfigError: the input is not made of real numbers.
        """
        if not x.is_floating_point():
            raise ConfigError(
                f"radius= moves the input of {type(module).__name__}, and that is {x.dtype}; name the next layer"
            )
        kind = kind_of(module)
        assert kind is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        last = kind.outputs_last(module, wide)
        eps = self.rng.normal(last)
        rows = last.reshape(last.shape[0] if last.ndim > 1 else 1, -1, last.shape[-1])
        scale = rows.new_ones(())
        if self.normalize:
            scale = std_of_rows(rows.detach().flatten(0, 1), type(module).__name__)
        eps = eps * (scale > 0)
        if self.adaptive:
            change = self.radius * last * eps
        else:
            size = torch.linalg.vector_norm(rows / divisor(scale), dim=(1, 2)) / math.sqrt(rows.shape[1])
            size = size.reshape(-1, *[1] * (last.ndim - 1)) if last.ndim > 1 else size
            length = torch.linalg.vector_norm(eps, dim=-1, keepdim=True)
            unit = eps / length.clamp_min(torch.finfo(eps.dtype).tiny)  # a draw of exactly 0 stays 0
            change = self.radius * size * scale * unit
        return kind.outputs_back(module, change).reshape(wide.shape)


def perturb_passes(tap: Tap, noise: Callable[[], Noise | None]) -> None:
    """Perturb the forward passes themselves, unless the last layer is meant: its output alone does as well."""
    if list(tap.layers) != list(supported_layers(tap.model))[-1:] and not tap.unsettled:
        tap.injector = noise


def increase(scene: Scene, options: Options, seed: int, step: int) -> Contributions:
    """The perturbed loss minus the loss, all layers moved at once; one for each of ``options.probes`` draws.

    An output layer's is computed from its output alone, others from one more forward pass for each draw.
    """
    assert scene.replay is not None
    losses = []
    for k in range(options.probes):
        noise = Noise.of(options, seed, step * options.probes + k)
        moved = _moved_outputs(scene, noise)
        loss = None if moved is None else scene.replay.loss_of(moved)
        losses.append(scene.replay.loss(inject=noise) if loss is None else loss)
    growth = torch.stack([loss - scene.loss for loss in losses]).reshape(len(losses), -1)
    return Contributions(growth, None, f"radius({options.radius:g})", False)


def _moved_outputs(scene: Scene, noise: Noise) -> Tensor | None:
    """The outputs with ``phi + change`` for phi, if they are those of the one dense layer or a view of them."""
    if scene.outputs is None or len(scene.calls) != 1 or not isinstance(scene.calls[0].module, nn.Linear):
        return None
    (call,), outputs = scene.calls, scene.outputs
    z, same = call.output, same_values(call, outputs, call.output)
    view = call.untouched() and z.is_contiguous() and z.data_ptr() == outputs.data_ptr()
    if not same and not (view and z.numel() == outputs.numel()):
        return None
    change = noise.change(call.module, call.input())
    moved = (change @ call.weight.to(change.dtype).mT).to(outputs.dtype)
    if same:
        return outputs + moved.reshape(outputs.shape)
    return outputs + moved.contiguous().as_strided(outputs.shape, outputs.stride())
