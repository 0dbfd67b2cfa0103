"""The networks that are benchmarked, each with a batch to train on; their last Linear is called ``output``."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relflat.lab.tasks.models import mlp, resnet18

Batch = tuple[Tensor, Tensor]


class TextEncoder(nn.Module):
    """Token embedding, a transformer encoder (pre-norm, GELU), mean over tokens and a Linear output layer."""

    def __init__(self, vocabulary: int = 4096, width: int = 256, depth: int = 6, num_classes: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.output = nn.Linear(width, num_classes)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n d"]:
        """Return the logits."""
        return self.output(self.encoder(self.embedding(tokens)).mean(1))


def pictures(n: int, channels: int, size: int) -> Batch:
    """Normal pixels and labels of ten classes."""
    return torch.randn(n, channels, size, size), torch.randint(10, (n,))


def sentences(n: int, length: int = 64, vocabulary: int = 4096) -> Batch:
    """Uniform tokens and labels of ten classes."""
    return torch.randint(vocabulary, (n, length)), torch.randint(10, (n,))


def bert(small: bool) -> nn.Module:
    """BERT-base with random weights, attention without fused kernels."""
    from transformers import BertConfig, BertForSequenceClassification  # only where it is asked for

    sizes = _sizes(small, 768, 12, 12) | ({"vocab_size": 4096} if small else {})
    return BertForSequenceClassification(BertConfig(num_labels=10, attn_implementation="eager", **sizes))


def vit(small: bool) -> nn.Module:
    """ViT-S with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = _sizes(small, 384, 12, 6)
    return ViTForImageClassification(ViTConfig(num_labels=10, image_size=32 if small else 224, **sizes))


def _sizes(small: bool, width: int, depth: int, heads: int) -> dict[str, int]:
    width, depth, heads = (48, 2, 2) if small else (width, depth, heads)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, depth, heads, 4 * width), strict=True))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "resnet18": (resnet18, partial(pictures, channels=3, size=32)),
    "mlp": (partial(mlp, 784, (1024, 1024, 1024)), partial(pictures, channels=1, size=28)),
    "transformer": (TextEncoder, sentences),
}
