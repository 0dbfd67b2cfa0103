"""A check on data that a change of the weights left the network's function as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relflat.errors import GraphError
from relflat.options import checked


@checked
@contextmanager
def preserving(
    model: nn.Module, *inputs: Any, output: Callable[[Any], Tensor] = lambda outputs: outputs, rtol: float = 1e-5
) -> Iterator[None]:
    """Check on data that what is done inside ``with`` leaves the model's function as it was.

    Args:
        model: the network, in a deterministic mode.
        inputs: what to call it with.
        output: the part of its outputs to compare, for example the softmax of the logits.
        rtol: largest allowed change, relative to the largest output.

    Raises:
        GraphError: the outputs changed. Parameters and buffers of the model have been put back.

    Cost: two forward passes.

    Example:
        >>> from relflat.reparam import rescale_layer
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with preserving(net, torch.randn(5, 3)):
        ...     rescale_layer(net[0], net[1], net[2], factor=10.0)
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = output(model(*inputs))
    yield
    with torch.no_grad():
        change = (output(model(*inputs)) - before).abs().max().item()
    allowed = rtol * max(before.abs().max().item(), 1e-30)
    if not change <= allowed:
        model.load_state_dict(state)
        raise GraphError(
            f"the outputs changed by {change:.3g}, more than {allowed:.3g}: this was no reparameterisation, "
            "and the weights have been put back. Do the layers follow each other as declared, each used once?"
        )
