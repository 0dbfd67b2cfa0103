"""Whether samples influence each other after a layer (BatchNorm in training mode, contrastive losses).

Where they do not, the curvature is block-diagonal over samples: every sample is a group with directions of its own.
A direction that is zero on some samples has an image that is zero there too, exactly, unless samples are coupled.
Any two samples are told apart by one of ``log2 n`` directions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from relflat.capture.calls import Call
from relflat.capture.graph import operation
from relflat.curvature.operators import Operator, pull
from relflat.rng import Rng

_LEAK = 1e-6  # what counts as exactly zero, relative to the response of a sample itself


_REORDERING = ("Flip", "Gather", "Roll", "Scatter", "ScatterAdd", "Sort", "Take", "Topk")


def may_reorder(node: Any) -> bool:
    """Whether an operation may put samples, its first dimension, in an order of its own each time it runs."""
    name = operation(node)
    if name == "Index":
        first = node._saved_indices[0]
        return first is not None and not (
            first.ndim == 1 and torch.equal(first, torch.arange(len(first), device=first.device))
        )
    dims = getattr(node, "_saved_dims", getattr(node, "_saved_dim", 0))
    return name.startswith(("Index", *_REORDERING)) and (dims in (0, ()) or (isinstance(dims, tuple) and 0 in dims))


def coupled_in_products(operator: Operator, calls: Sequence[Call], rng: Rng, *, once: bool = False) -> bool:
    """Ask products with the curvature. Cost: ``log2 n`` of them, or one with a random split."""

    def respond(own: Bool[Tensor, " n"]) -> list[Tensor]:
        directions = []
        for call in calls:
            u = rng.signs(tuple(call.rows(call.output).shape), call.output)
            u[~own] = 0
            directions.append(call.from_rows(u))
        return operator(directions)

    return any(_leaks(calls, respond(own), own) for own in _splits(calls[0], rng, once))


def coupled_in_outputs(outputs: Tensor, calls: Sequence[Call], rng: Rng, *, once: bool = False) -> bool:
    """Ask first derivatives of the outputs: ``2 log2 n`` backward passes of what comes after the layer, or two."""
    if outputs.ndim == 0 or outputs.shape[0] != calls[0].samples:
        return True  # no telling which output belongs to which sample; one group is right in any case

    def respond(own: Bool[Tensor, " n"]) -> list[Tensor]:
        r = rng.signs(tuple(outputs.shape), outputs)
        r[~own] = 0
        return pull([outputs], calls, [r], create_graph=False)

    return any(_leaks(calls, respond(own), own) for half in _splits(calls[0], rng, once) for own in (half, ~half))


def _leaks(calls: Sequence[Call], response: Sequence[Tensor], own: Bool[Tensor, " n"]) -> bool:
    """Whether something comes out at samples where nothing was put in."""
    sizes = [c.rows(x.detach()).abs().flatten(1) for c, x in zip(calls, response, strict=True)]
    size = torch.cat(sizes, dim=1)
    return size.numel() > 0 and bool(size[~own].max() > _LEAK * size[own].max())


def _splits(call: Call, rng: Rng, once: bool) -> Iterator[Bool[Tensor, " n"]]:
    """Splits of the samples in two, by the binary digits of their numbers; or one, at random."""
    if once:
        half = rng.signs((call.samples,), call.output.detach().float()) > 0
        half[0], half[-1] = True, False
        yield half
        return
    numbers = torch.arange(call.samples, device=call.output.device)
    for digit in range((call.samples - 1).bit_length()):
        yield numbers.bitwise_right_shift(digit).bitwise_and(1).bool()
