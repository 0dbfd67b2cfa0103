"""Recurrent cells, attention, transformer encoders, embeddings, and samples coupled over rows."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import CLASSES, IN, Family, N, Net, image
from checks import EachArchitecture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

architecture = Family()


@architecture("cell.weight_hh", "cell.weight_ih", x=image(3, 2))
def rnn_cell_unrolled() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return m.head(h)

    return Net(run, cell=nn.RNNCell(2, 3), head=nn.Linear(3, CLASSES))


@architecture("rnn.weight_hh_l0", "rnn.weight_ih_l0", "head", x=image(3, 2))
def lstm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, CLASSES)
    )


@architecture("rnn.weight_hh_l0_reverse", x=lambda: torch.randn(3, N, 2))
def gru_time_first_both_ways() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.rnn(x)[0].mean(0)), rnn=nn.GRU(2, 2, bidirectional=True), head=nn.Linear(4, CLASSES)
    )


@architecture("attention.in_proj_weight", "attention.out_proj.weight", x=image(3, 2))
def multihead_attention() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.attention(x, x, x)[0].tanh().mean(1)),
        attention=nn.MultiheadAttention(2, 2, batch_first=True),
        head=nn.Linear(2, CLASSES),
    )


@architecture("q", "v", x=image(3, 2))
def attention_by_the_math_kernel() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            z = F.scaled_dot_product_attention(m.q(x)[:, None], m.k(x)[:, None], m.v(x)[:, None], is_causal=True)
        return m.head(z[:, 0, -1])

    return Net(run, q=nn.Linear(2, 2), k=nn.Linear(2, 2), v=nn.Linear(2, 2), head=nn.Linear(2, CLASSES))


def encoder(batch_first: bool) -> nn.Module:
    block = lambda: nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=batch_first, activation=F.gelu)

    def run(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return m.head(m.two(m.one(x)).mean(1 if batch_first else 0))

    return Net(run, one=block(), two=block(), head=nn.Linear(2, CLASSES))


@architecture("one.linear1", "two.linear2", x=image(2, 2))
def transformer_encoder_batch_first() -> nn.Module:
    return encoder(batch_first=True)


@architecture("one.linear2", "two.linear1", x=lambda: torch.randn(2, N, 2))
def transformer_encoder_time_first() -> nn.Module:
    """The first dimension is time: what looks like samples is coupled, and is found to be."""
    return encoder(batch_first=False)


@architecture("frame", x=lambda: torch.randn(4 * 2, IN), y=lambda: torch.tensor([0, 2, 1, 1]))
def frames_pooled_in_neighbours() -> nn.Module:
    """Rows 2 i and 2 i + 1 are one sample: coupled, though not the first half of the rows with the second."""
    return Net(
        lambda m, x: m.head(m.frame(x).reshape(4, 2, 2).prod(1).tanh()),
        frame=nn.Linear(IN, 2),
        head=nn.Linear(2, CLASSES),
    )


@architecture("embed", x=lambda: torch.tensor([[0, 3], [1, 1], [2, 0], [3, 3], [1, 2]]))
def embedding_with_sparse_gradients() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.embed(x).tanh().mean(1)),
        embed=nn.Embedding(4, 2, sparse=True),
        head=nn.Linear(2, CLASSES),
    )


@pytest.fixture(autouse=True)
def _without_cudnn() -> Iterator[None]:
    """Its recurrent kernels have no second derivative."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


class TestSequences(EachArchitecture):
    family = architecture
