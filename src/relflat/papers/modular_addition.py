"""Modular addition, where generalisation comes long after the training data are known by heart (Power et al. 2022).

All pairs ``(a, b)`` of residues modulo a prime are the data and ``(a + b) mod p`` is the class. A share of them is
trained on; the rest is split evenly between validation and test. Han et al. (2025) use the gap between memorising
and generalising as a probe: relative flatness falls when generalisation sets in, and training away from flat minima
(FAM with a negative strength) delays it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relflat.errors import ConfigError
from relflat.lab.data.arrays import Arrays, RawData
from relflat.lab.data.splits import Splits, classification
from relflat.lab.tasks.records import read


def additions(modulus: int) -> RawData:
    """All pairs of residues with their sum as the class; inputs int64 of shape (modulus^2, 2)."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return RawData(Arrays(pairs, pairs.sum(1) % modulus), None, modulus)


def splits(
    *, train_size: int | None, label_noise: float, seed: int, modulus: int = 97, fraction: float = 0.4
) -> Splits:
    """Cut the table of sums; a ``fraction`` of all pairs is there to train on."""
    if modulus < 2:
        raise ConfigError(f"modulus={modulus}: there are no sums to learn; give a prime such as 97.")
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction} of the pairs must lie between 0 and 1.")
    rest = modulus**2 - round(fraction * modulus**2)
    cut = partial(classification, validation=rest // 2, test=rest - rest // 2, standardise=False)
    return cut(partial(additions, modulus), train_size=train_size, label_noise=label_noise, seed=seed)


class AdditionMLP(nn.Module):
    """Embeddings of both residues side by side, one hidden layer of ReLU, and ``output``, one logit a residue."""

    def __init__(self, modulus: int = 97, width: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modulus, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.output = nn.Linear(hidden, modulus)

    def forward(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n p"]:
        """Return logits of the sum."""
        return self.output(self.hidden(self.embedding(pairs).flatten(1)).relu())


class Block(nn.Module):
    """A transformer block without normalisation: attention, then an MLP four times as wide, both added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        """Apply the block; every position sees every other."""
        query, key, value = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + self.attended((attention @ value).transpose(1, 2).flatten(2))
        return x + self.fc2(self.fc1(x).relu())


class AdditionTransformer(nn.Module):
    """A small transformer over ``a b =``; the answer is read at the last place (as in Nanda et al. 2023)."""

    def __init__(self, modulus: int = 97, width: int = 128, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modulus + 1, width)
        self.position = nn.Parameter(torch.randn(3, width) / math.sqrt(width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.output = nn.Linear(width, modulus)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(width))

    def forward(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n p"]:
        """Return logits of the sum."""
        sign = pairs.new_full((len(pairs), 1), self.embedding.num_embeddings - 1)
        x = self.embedding(torch.cat([pairs, sign], 1)) + self.position
        return self.output(self.blocks(x)[:, -1])


NAMED = {each.__name__: each for each in (splits, AdditionMLP, AdditionTransformer)}
TABLES = Path(__file__).with_name("tasks.toml")
ADDITION, ADDITION_TRANSFORMER = read(TABLES, "addition", "addition-transformer", own=NAMED)


def learnt_at(history: Sequence[Mapping[str, Any]], split: str, level: float = 0.99) -> int | None:
    """The first epoch from which on accuracy on a split never falls below ``level`` again, or None."""
    found = None
    for record in history:
        if record[f"{split}_accuracy"] < level:
            found = None
        elif found is None:
            found = int(record["epoch"])
    return found
