"""A model under measurement: in evaluation mode, and as it was found after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in evaluation mode; modes and weights are then as before.

    A module whose ``train()`` is its own may do something there (LoRA layers merge their weights when they leave
    training, averages of weights take their place): it is called back by that method, and the rounding of what it
    did and undid is mended.
    """
    modes = {m: m.training for m in model.modules()}
    acting = [m for m in modes if getattr(m.train, "__func__", None) is not nn.Module.train]
    weights = {p: p.detach().clone() for m in acting for p in m.parameters(recurse=m is not model)}
    try:
        if any(modes.values()):
            model.eval()
        yield
    finally:
        for module in acting:
            if module.training != modes[module]:
                module.train(modes[module])
        for module, training in modes.items():
            module.training = training
        for p, before in weights.items():
            if not torch.equal(p, before):
                p.data.copy_(before)


def backward_passes() -> int:
    """How many backward passes autograd has begun so far, this call's own included."""
    found: list[int] = []
    with torch.enable_grad():
        one = torch.ones((), requires_grad=True)
        value = one.clone()
    node = get_gradient_edge(value).node
    node.register_prehook(lambda gradients: found.append(torch._C._current_graph_task_id()))
    torch.autograd.grad(value, one)
    return found[0]
