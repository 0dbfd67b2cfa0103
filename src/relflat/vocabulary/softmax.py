r"""Cross-entropy and kappa of a chunk of tokens, and what their gradients need, from two passes over the classes.

With k the most likely class of a token and ``q = pi - e_k``,

    delta = mu - w_k = q W        v = q . ||w~||^2 - delta . (2 w~_k + delta)

where ``~`` is for "minus the mean row of W", which kappa does not see. All entries of q are of the size of what is
missing to certainty, so nothing cancels when a token is certain, or rows share a large part. Therefore class k is
left out of the blocks, and added exactly.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relflat.vocabulary import blocks as on_blocks
from relflat.vocabulary.rows import Rows


class Tokens(NamedTuple):
    """A chunk of tokens.

    Attributes:
        phi: features.
        y: targets.
        a: weights in the reduction.
        norm2: ``||phi||^2``.
        beta: ``strength a ||phi||^2``, the weight of v in the total.
    """

    phi: Float[Tensor, "p m"]
    y: Int[Tensor, "p 1"]
    a: Float[Tensor, "p 1"]
    norm2: Float[Tensor, "p 1"]
    beta: Float[Tensor, "p 1"]


class Block(NamedTuple):
    """A block of classes, and a number for each token and class: its logit, later ``e_pc = exp(z_pc - z_pk)``."""

    classes: slice
    values: Float[Tensor, "p c"]


class Softmax(NamedTuple):
    """Softmax of a chunk of tokens: ``pi_pc = largest e_pc`` for all classes but k, ``pi_pk = largest``.

    Attributes:
        blocks: ``e``, 0 for class k.
        largest: the largest probability.
        others: ``sum_c e_pc``.
        k: the most likely class.
        w_k: the row of that class that kappa sees.
        delta: ``mu - w_k``, mu the mean under pi of the rows that kappa sees.
        mu: the same mean, minus that over all classes alike.
        v: variance of those rows under pi.
        task: cross-entropy.
        kappa: ``||phi||^2 v``.
    """

    blocks: list[Block]
    largest: Float[Tensor, "p 1"]
    others: Float[Tensor, "p 1"]
    k: Int[Tensor, "p 1"]
    w_k: Float[Tensor, "p r"]
    delta: Float[Tensor, "p r"]
    mu: Float[Tensor, "p r"]
    v: Float[Tensor, "p 1"]
    task: Float[Tensor, " p"]
    kappa: Float[Tensor, " p"]


def softmax(rows: Rows, t: Tokens, smoothing: float, buffer: Float[Tensor, " entries"]) -> Softmax:
    """Fill the buffer with ``e`` and sum up what cross-entropy and kappa are made of."""
    kernels = on_blocks.kernels_for(buffer)
    blocks = _blocks(rows, len(t.phi), buffer)
    top, k, expected = _logits(rows, t, smoothing, blocks, kernels)

    w_k = rows.of_kappa(k[:, 0])
    others, second, delta = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(w_k)
    for c, z in blocks:
        kernels.exponentials(z, top, k - c.start, rows.norms[c], others, second)  # z is e from here on
        delta.addmm_(z, rows.of_kappa(c))
    largest = 1 / (1 + others)

    # delta = sum_c pi_c (w_c - w_k) over c != k, and likewise the first term of v with ||w~_c||^2 in place of w_c.
    delta = largest * (delta - others * w_k)
    around = delta * (2 * (w_k - rows.kappa_mean) + delta)
    v = largest * (second - others * rows.norms[k]) - around.sum(1, keepdim=True)
    del around

    task = top - expected + others.log1p()  # log sum_c exp z_c = z_k + log(1 + sum of the others)
    mu = w_k - rows.kappa_mean + delta
    return Softmax(blocks, largest, others, k, w_k, delta, mu, v, task[:, 0], t.norm2[:, 0] * v[:, 0])


def _blocks(rows: Rows, tokens: int, buffer: Float[Tensor, " entries"]) -> list[Block]:
    """One contiguous block for each chunk of classes: rows a power of two apart slow matrix products by a fifth."""
    return [
        Block(c, buffer[tokens * c.start : tokens * c.stop].view(tokens, c.stop - c.start)) for c in rows.classes()
    ]


def _logits(
    rows: Rows, t: Tokens, smoothing: float, blocks: list[Block], kernels: ModuleType
) -> tuple[Float[Tensor, "p 1"], Int[Tensor, "p 1"], Float[Tensor, "p 1"]]:
    """Fill the blocks with ``z``; its largest entry for each token, where that is, and ``sum_c t_c z_c``."""
    top, k = t.phi.new_full((len(t.phi), 1), -torch.inf), torch.zeros_like(t.y)
    at_target, all_logits = torch.zeros_like(top), torch.zeros_like(top)
    for c, z in blocks:
        torch.mm(t.phi, rows.of_weight(c).mT, out=z)
        kernels.raise_top(z, rows.bias_of(c), c.start, top, k)
        at_target += on_blocks.pick(z, t.y - c.start)
        if smoothing:
            all_logits += z.sum(1, keepdim=True)
    # The smoothed target is t = (1 - s) e_y + s / d.
    return top, k, (1 - smoothing) * at_target + smoothing / len(rows.norms) * all_logits
