"""The finite-radius penalty: how much the loss grows when the features of layers move at random.

``E[L(phi + radius ||phi|| u) - L(phi)]`` is the feature robustness of Petzka et al. (Def. 2), which is
``radius^2 / (2 m) kappa`` to second order (I8). It needs no derivative of the loss.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relflat.capture.calls import Call, same_values
from relflat.capture.kinds import kind_of
from relflat.capture.tap import Inject
from relflat.curvature.scales import divisor, std_of_rows
from relflat.errors import ConfigError
from relflat.estimate.contributions import Contributions
from relflat.estimate.replay import Replay
from relflat.estimate.scene import Scene
from relflat.options import Options
from relflat.rng import Rng


def increase(scene: Scene, options: Options, seed: int, step: int) -> Contributions:
    """The perturbed loss minus the loss, all layers moved at once; one for each of ``options.probes`` draws.

    An output layer's is computed from its output alone, others from one more forward pass for each draw.
    """
    assert scene.replay is not None
    losses, at_end = [], len(scene.calls) == 1
    for k in range(options.probes):
        inject = perturbation(options, seed, step * options.probes + k)
        loss = _at_the_end(scene, scene.replay, inject) if at_end else None
        at_end = loss is not None
        losses.append(scene.replay.loss(inject=inject) if loss is None else loss)
    growth = torch.stack([loss - scene.loss for loss in losses]).reshape(len(losses), -1)
    return Contributions(growth, None, f"radius({options.radius:g})", False)


def perturbation(options: Options, seed: int, draw: int) -> Inject:
    """A change to the layers' inputs, the same for the same draw."""
    assert options.radius is not None
    return noisy(
        options.radius, Rng(seed, draw), adaptive=options.adaptive, normalize=options.normalize_features
    )


def noisy(radius: float, rng: Rng, *, adaptive: bool = False, normalize: bool = False) -> Inject:
    """Add :func:`noise` to what a layer is given."""

    def inject(module: nn.Module, x: Tensor) -> Tensor:
        return (x + noise(module, x, radius, rng, adaptive=adaptive, normalize=normalize)).to(x.dtype)

    return inject


def noise(
    module: nn.Module, x: Tensor, radius: float, rng: Rng, *, adaptive: bool = False, normalize: bool = False
) -> Tensor:
    """A random change of a layer's input: ``radius ||phi||`` times a unit vector uniform on the sphere.

    With several positions in a sample (tokens, pixels) the noise is independent at each, with the root mean
    square of the sample's ``||phi||`` as scale. If adaptive, ``radius * phi * eps`` with eps standard normal:
    Gaussian dropout of variance ``radius^2``. If normalised, the same for features divided by their standard
    deviation over the batch, without those (for convolutions: channels) that do not vary in it.

    Raises:
        ConfigError: if the input is not made of real numbers.
    """
    if not x.is_floating_point():
        raise ConfigError(
            f"radius= moves the input of {type(module).__name__}, and that is {x.dtype}; name the next layer"
        )
    kind = kind_of(module)
    assert kind is not None
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    last = kind.outputs_last(module, wide)
    last = wide if last.shape == wide.shape else last
    eps = rng.normal(last)
    rows = last.reshape(last.shape[0] if last.ndim > 1 else 1, -1, last.shape[-1])
    scale = (
        std_of_rows(rows.detach().flatten(0, 1), type(module).__name__) if normalize else rows.new_ones(())
    )
    eps = eps * (scale > 0)
    if adaptive:
        change = radius * last * eps
    else:
        size = torch.linalg.vector_norm(rows / divisor(scale), dim=(1, 2)) / math.sqrt(rows.shape[1])
        size = size.reshape(-1, *[1] * (last.ndim - 1)) if last.ndim > 1 else size
        length = torch.linalg.vector_norm(eps, dim=-1, keepdim=True)
        unit = eps / length.clamp_min(torch.finfo(eps.dtype).tiny)  # a draw of exactly 0 stays 0
        change = radius * size * scale * unit
    return change if last is wide else kind.outputs_back(module, change).reshape(wide.shape)


def _at_the_end(scene: Scene, replay: Replay, inject: Inject) -> Tensor | None:
    """The loss of the moved output of the one layer, if the loss is computed from that as it is."""
    (call,) = scene.calls
    if scene.outputs is None or not isinstance(call.module, nn.Linear):
        return None
    phi = call.input().to(torch.promote_types(call.phi.dtype, torch.float32))
    moved = _shifted(call, scene.outputs, inject(call.module, phi) - phi)
    return None if moved is None else replay.loss_of(moved)


def _shifted(call: Call, outputs: Tensor, change: Float[Tensor, "... m"]) -> Tensor | None:
    """The outputs with ``phi + change`` for phi, if they are a view of the dense layer's output; else None."""
    moved = (change @ call.weight.to(change.dtype).mT).to(outputs.dtype)
    if same_values(call, outputs, call.output):
        return outputs + moved.reshape(outputs.shape)
    z = call.output
    same_start = call.untouched() and z.is_contiguous() and z.data_ptr() == outputs.data_ptr()
    if same_start and z.numel() == outputs.numel():
        return outputs + moved.contiguous().as_strided(outputs.shape, outputs.stride())
    return None
