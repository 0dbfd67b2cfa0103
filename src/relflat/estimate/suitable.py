"""Whether the layers that are regularised go with the options."""

from torch import nn

from relflat.capture.resolve import Target
from relflat.capture.tap import Tap
from relflat.errors import ConfigError, LayerError
from relflat.options import Options


def must_suit(tap: Tap, options: Options) -> None:
    """Refuse layers that do not go with the options, by name; ``"output"`` and globs may be settled later."""
    wanted, count = options.layers_per_step, len(tap.layers)
    if wanted is not None and not 1 <= wanted <= count:
        raise ConfigError(
            f"layers_per_step={wanted}: a number from 1 to {count} is needed, as the layers are {list(tap.layers)}; "
            "None takes all of them"
        )
    if tap.unsettled:
        return
    if options.normalize_features or options.radius is not None:
        tap.must_have_features("normalize_features" if options.normalize_features else "radius=")
    for name in filter(lambda name: _frozen(tap.layers[name]), tap.layers) if options.gradient == "weights" else ():
        raise LayerError(
            f"gradient='weights' reaches the weight of layer {name!r} only, and that is frozen "
            "(requires_grad=False); unfreeze it or use gradient='full'"
        )


def _frozen(target: Target) -> bool:
    parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
    return not any(p.requires_grad for p in parameters if p.ndim > 1)
