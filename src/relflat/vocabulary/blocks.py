"""Elementwise work on a block of logits, tokens x classes; ``triton`` has the same as kernels."""

import sys
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

_Column = Float[Tensor, "p 1"]


def kernels_for(x: Tensor) -> ModuleType:
    """The module with :func:`raise_top`, :func:`exponentials` and :func:`curve` for tensors like ``x``.

    The Triton kernels where ``x`` is on a CUDA device in float32 and ``triton`` can be imported, else this module.
    """
    if x.is_cuda and x.dtype == torch.float32:
        try:
            import relflat.vocabulary.triton as kernels
        except ImportError:
            return sys.modules[__name__]
        return kernels
    return sys.modules[__name__]


def raise_top(
    z: Float[Tensor, "p c"], bias: Float[Tensor, " c"] | None, first: int, top: _Column, k: Int[Tensor, "p 1"]
) -> None:
    """Add the bias, and bring the largest logit of each token and its class up to date. All in place.

    Args:
        z: logits of a block of classes, before the bias.
        bias: of these classes.
        first: number of the first class of the block.
        top: the largest logit in the blocks so far.
        k: its class.
    """
    if bias is not None:
        z += bias
    value = z.amax(1, keepdim=True)
    rows = (value > top).nonzero()[:, 0]  # finding the place takes 20 times as long as the value
    if len(rows):
        k[rows] = z[rows].argmax(1, keepdim=True) + first
    torch.maximum(top, value, out=top)


def exponentials(
    z: Float[Tensor, "p c"],
    top: _Column,
    k: Int[Tensor, "p 1"],
    norms: Float[Tensor, " c"],
    others: _Column,
    second: _Column,
) -> None:
    """Replace logits by ``exp(z - top)``, 0 in column ``k``; add their sum, and that times ``norms``. All in place.

    Args:
        z: logits of a block.
        top: the largest of each token.
        k: its column, outside the block if it is not of this block.
        norms: a number for each class.
        others: gets ``sum_c e_pc``.
        second: gets ``sum_c e_pc norms_c``.
    """
    z.sub_(top).exp_()
    put(z, k, torch.zeros_like(top))
    others += z.sum(1, keepdim=True)
    second += z @ norms[:, None]


def curve(
    e: Float[Tensor, "p c"],
    left: Float[Tensor, "p r"],
    rows: Float[Tensor, "c r"],
    norms: Float[Tensor, " c"],
    slope: _Column,
    level: _Column,
    out: Float[Tensor, "p c"],
) -> None:
    """``out = e * (left @ rows.T + slope * norms + level)``, for a block."""
    torch.mul(slope, norms, out=out).add_(level)
    out.addmm_(left, rows.mT).mul_(e)


def put(block: Float[Tensor, "p c"], column: Int[Tensor, "p 1"], value: _Column) -> None:
    """Set one entry of each row, where its column is in the block."""
    i, inside = _clamped(block, column)
    block.scatter_(1, i, torch.where(inside, value, block.gather(1, i)))


def add(block: Float[Tensor, "p c"], column: Int[Tensor, "p 1"], value: _Column) -> None:
    """Add to one entry of each row, where its column is in the block."""
    i, inside = _clamped(block, column)
    block.scatter_add_(1, i, torch.where(inside, value, torch.zeros_like(value)))


def pick(block: Float[Tensor, "p c"], column: Int[Tensor, "p 1"]) -> _Column:
    """One entry of each row; 0 where its column is not in the block."""
    i, inside = _clamped(block, column)
    found = block.gather(1, i)
    return torch.where(inside, found, torch.zeros_like(found))


def _clamped(block: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Columns made valid, and whether they were."""
    width = block.shape[1]
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
