"""A model under measurement: in evaluation mode, and as it was found after it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in evaluation mode; modes, buffers and weights are then as before.

    A module whose ``train()`` is its own may do something there (LoRA layers merge their weights when they leave
    training, averages of weights take their place): it is called back by that method, and the rounding of what it
    did and undid is mended.
    """
    modes = {m: m.training for m in model.modules()}
    acting = [m for m in modes if getattr(m.train, "__func__", None) is not nn.Module.train]
    weights = [p for m in acting for p in m.parameters(recurse=m is not model)]
    with _unchanged([*weights, *model.buffers()]):
        buffers = {m: dict(m._buffers) for m in modes}
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
                module._buffers.update(buffers[module])


@contextmanager
def _unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within the block tensors may be written to (observers and memory banks do in any mode); not after it."""
    kept = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]
    yield
    for t, before in kept:
        if not torch.equal(t, before):
            t.data.resize_(before.shape).copy_(before)


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
