"""Tasks on texts: a pretrained sentence encoder, MiniLM, under a new output layer (extra ``transformers``).

Inputs are the encoder's keyword arguments at one fixed length: ``input_ids``, ``attention_mask`` and, for pairs of
sentences, ``token_type_ids``, each (n, tokens). Everything is read from the cache; nothing asks the network.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relflat.errors import DataError
from relflat.lab.data import hub, reviews
from relflat.lab.data.arrays import Arrays, RawData
from relflat.lab.data.fetch import files, reading, require
from relflat.lab.data.sources import SOURCES

TOKENS = 64  # longest input of single sentences
PAIR_TOKENS = 128  # of pairs of sentences
library = partial(hub.client, "transformers", "Tasks on texts need transformers", "transformers")


def encode(texts: list[str], second: list[str] | None = None, *, tokens: int) -> dict[str, Int[Tensor, "n tokens"]]:
    """Texts, or pairs of texts, as MiniLM's token ids, cut or padded on the right to one length."""
    with reading("minilm") as folder:
        tokenizer = library().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    coded = tokenizer(texts, second, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if second is not None else [])
    return {name: coded[name] for name in names}


class TextClassifier(nn.Module):
    """An encoder of `transformers`, the mean of its last hidden states, dropout and an output layer."""

    def __init__(self, encoder: nn.Module, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(config.hidden_size, num_classes)

    def forward(
        self,
        input_ids: Int[Tensor, "n tokens"],
        attention_mask: Int[Tensor, "n tokens"],
        token_type_ids: Int[Tensor, "n tokens"] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Return the logits. Columns that are padding in all rows are left out: the logits stay, the cost falls."""
        longest = int(attention_mask.sum(1).max())
        mask = attention_mask[:, :longest]
        kinds = None if token_type_ids is None else token_type_ids[:, :longest]
        found = self.encoder(input_ids=input_ids[:, :longest], attention_mask=mask, token_type_ids=kinds)
        hidden: Tensor = found.last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.output(self.dropout((hidden * weight).sum(1) / weight.sum(1)))


def minilm(num_classes: int = 2) -> TextClassifier:
    """all-MiniLM-L6-v2 (22.6 M parameters without its pooler) under a new output layer."""
    return TextClassifier(load_encoder(files("minilm")), num_classes)


def load_encoder(folder: Path) -> nn.Module:
    """A BERT-like encoder from a folder, without the pooler that nothing here uses; no weight may be missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = library().AutoConfig.from_pretrained(folder, local_files_only=True)
        encoder: nn.Module = library().AutoModel.from_config(config, add_pooling_layer=False).float()
        missing = encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} holds no usable encoder: {error}. Delete it and get it again.") from error
    if missing:
        raise DataError(f"{folder}/model.safetensors has no weights for {', '.join(missing)}. Get it again.")
    return encoder


def read_reviews() -> RawData:
    """Film sentences as the pool; Amazon, news and tweets are test sets from elsewhere."""
    require("reviews", "minilm")
    domains = {
        name: Arrays(encode(part.texts, tokens=TOKENS), torch.tensor(part.labels))
        for name, part in reviews.sentences(files("reviews")).items()
    }
    return RawData(domains.pop("films"), None, 2, domains)


def read_glue(name: str) -> RawData:
    """``rte``, ``mrpc`` or ``sst2``; the official validation set is the test set, for the test labels are secret."""
    require(name, "minilm")
    source = SOURCES[name]

    def part(rows: Any) -> Arrays:
        texts = [rows[column][:] for column in source.inputs]
        tokens = TOKENS if len(texts) == 1 else PAIR_TOKENS
        return Arrays(encode(*texts, tokens=tokens), torch.tensor(rows[source.label][:]))

    with reading(name) as folder:
        train, test = hub.splits(source, folder)
    return RawData(part(train), part(test), source.classes)
