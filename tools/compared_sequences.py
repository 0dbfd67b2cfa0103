"""More networks that ``same_values.py`` measures: sequences, and layers and weights that are used more than once."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compared_networks import CLASSES, IN, N, Net, Network, convolutions, dense, losses, tokens, values


def sequences() -> list[Network]:
    """Embeddings, attention, transformer blocks, recurrent networks."""

    def recurrent(rnn: nn.Module, features: int) -> nn.Module:
        return Net(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=rnn, head=nn.Linear(features, CLASSES))

    series = values(N, 3, 2)
    return [
        Network(
            "embedding",
            lambda: Net(
                lambda m, x: m.head(m.embed(x).tanh().mean(1)),
                embed=nn.Embedding(5, 3, padding_idx=0),
                head=nn.Linear(3, CLASSES),
            ),
            ("embed", "head"),
            x=tokens(3, 5),
        ),
        Network("tied embedding", _tied_embedding, ("embed", "decode", "embed.weight"), x=tokens(2, CLASSES)),
        Network("transformer", _transformer, ("block.linear1", "block.linear2", "head"), x=series),
        Network("attention", _attention, ("attention.in_proj_weight", "attention.out_proj.weight"), x=series),
        Network(
            "causal language model",
            _language_model,
            ("0", "1.block.linear1", "2"),
            x=tokens(3, 5),
            y=tokens(3, 5),
            loss=lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
        ),
        Network(
            "lstm",
            lambda: recurrent(nn.LSTM(2, 2, batch_first=True), 2),
            ("rnn.weight_hh_l0", "rnn.weight_ih_l0", "head"),
            x=series,
        ),
        Network(
            "gru",
            lambda: recurrent(nn.GRU(2, 2, batch_first=True, bidirectional=True), 4),
            ("rnn.weight_hh_l0_reverse", "head"),
            x=series,
        ),
    ]


def _tied_embedding() -> nn.Module:
    embed, decode = nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES, bias=False)
    decode.weight = embed.weight
    return Net(lambda m, x: m.decode(m.embed(x).tanh().mean(1)), embed=embed, decode=decode)


def _block(width: int = 2) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 1, 3, dropout=0.0, batch_first=True, activation=F.gelu)


def _by_the_math_kernel(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def inside(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run(m, x)

    return inside


def _transformer() -> nn.Module:
    run = _by_the_math_kernel(lambda m, x: m.head(m.block(x).mean(1)))
    return Net(run, block=_block(), head=nn.Linear(2, CLASSES))


def _language_model() -> nn.Module:
    def causal(m: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return m.block(x, src_mask=mask, is_causal=True)

    return nn.Sequential(nn.Embedding(5, 2), Net(_by_the_math_kernel(causal), block=_block()), nn.Linear(2, 5))


def _attention() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.attention(x, x, x)[0].tanh().mean(1)),
        attention=nn.MultiheadAttention(2, 2, batch_first=True),
        head=nn.Linear(2, CLASSES),
    )


def _head(features: int = IN) -> nn.Module:
    return nn.Linear(features, CLASSES)


def _tied() -> nn.Module:
    a, b = nn.Linear(IN, IN), nn.Linear(IN, IN)
    b.weight = a.weight
    return Net(lambda m, x: m.head(m.b(m.a(x).tanh()).tanh()), a=a, b=b, head=_head())


def _tied_and_recurrent() -> nn.Module:
    net: Any = _tied()
    net.run = lambda m, x: m.head(m.b(m.a(m.a(x).tanh()).tanh()).tanh())
    return net


def sharing() -> list[Network]:
    """Layers used more than once, and weights of two layers."""

    def chain(m: Any, x: Tensor) -> Tensor:
        return m.head(m.fc(m.fc(x).tanh()).tanh())

    def parallel(m: Any, x: Tensor) -> Tensor:
        return m.head(m.fc(x).tanh() * m.fc(x.flip(1)).sigmoid())

    return [
        Network("tied layers", _tied, ("a", "b", "a.weight", "head")),
        Network("tied and recurrent", _tied_and_recurrent, ("a",)),
        Network("in a chain", lambda: Net(chain, fc=nn.Linear(IN, IN), head=_head()), ("fc", "head")),
        Network("in parallel", lambda: Net(parallel, fc=nn.Linear(IN, 3), head=_head(3)), ("fc",)),
    ]


def unusual() -> list[Network]:
    """Samples that are coupled, an unknown class of layer, several outputs."""

    def coupled(m: Any, x: Tensor) -> Tensor:
        z = m.fc(x).tanh()
        return m.head(z - z.mean(0))

    def own(m: Any, x: Tensor) -> Tensor:
        return m.head(m.table(x[:, :2], x[:, 2:]).tanh())

    def named(m: Any, x: Tensor) -> dict[str, Tensor]:
        return {"h": m.fc(x).tanh(), "logits": m.head(m.fc(x).tanh())}

    return [
        Network("coupled samples", lambda: Net(coupled, fc=nn.Linear(IN, 3), head=_head(3)), ("fc", "head")),
        Network("bilinear", lambda: Net(own, table=nn.Bilinear(2, 2, 3), head=_head(3)), ("table.weight",)),
        Network(
            "dictionary of outputs",
            lambda: Net(named, fc=nn.Linear(IN, 3), head=_head(3)),
            ("fc", "head"),
            loss=lambda z, y: F.cross_entropy(z["logits"], y),
        ),
        Network(
            "two heads",
            lambda: Net(lambda m, x: (m.one(x), m.two(x.tanh())), one=_head(), two=_head()),
            ("one", "two"),
            loss=lambda z, y: F.cross_entropy(z[0], y) + 0.3 * F.cross_entropy(z[1], y),
        ),
    ]


def all_networks() -> list[Network]:
    """All of them, with unique names."""
    found = [*losses(), *dense(), *convolutions(), *sequences(), *sharing(), *unusual()]
    assert len({n.name for n in found}) == len(found)
    return found
