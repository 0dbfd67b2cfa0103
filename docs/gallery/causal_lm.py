"""A language model whose logits are never all there.

`linear_cross_entropy_fam` takes features and weight, and makes cross-entropy and kappa of the output layer in pieces.
The text is Python's own docstrings; the penalty holds kappa down, and the loss on held-out text moves little.
"""

import collections
import importlib
import inspect
import re

import matplotlib.pyplot as plt
import torch
from torch import nn

from relflat import linear_cross_entropy_fam

names = "argparse collections csv datetime decimal functools inspect json logging re shutil"
modules = map(importlib.import_module, names.split())
things = [t for m in modules for t in (m, *(f for _, f in inspect.getmembers(m, callable)))]
words = re.findall(r"\w+|[^\w\s]", "\n".join(dict.fromkeys(inspect.getdoc(t) or "" for t in things)).lower())
number = {w: i for i, (w, _) in enumerate(collections.Counter(words).most_common())}
ids = torch.tensor([number[w] for w in words])
train, test = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
width, context, mask = 64, 24, nn.Transformer.generate_square_subsequent_mask(24)


class GPT(nn.Module):
    """Embeddings and blocks; the weight of the output layer is that of the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(len(number), width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = (nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.LayerNorm(width))
        nn.init.normal_(self.words.weight, std=0.05)

    def forward(self, ids):
        """Features for the output layer."""
        return self.norm(self.blocks(self.words(ids) + self.places.weight, mask, is_causal=True))


def losses(model, ids, starts, strength):
    """Of each next word in the pieces of text that begin at ``starts``."""
    piece = ids[starts[:, None] + torch.arange(context + 1)]
    phi, weight = model(piece[:, :-1]), model.words.weight
    return linear_cross_entropy_fam(phi, weight, piece[:, 1:], strength=strength, chunk_tokens=128)


figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
figure.suptitle(
    f"{len(words):,} words of docstrings, {len(number):,} different, a tenth held out, one seed", fontsize="medium"
)
for strength in (0.0, 0.003):
    torch.manual_seed(0)
    model, found = GPT(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(121):
        if step % 20 == 0:
            with torch.no_grad():
                found.append(losses(model, test, torch.arange(0, len(test) - context, context), strength))
        loss = losses(model, train, torch.randint(len(train) - context, (16,)), strength)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    print(f"strength {strength:<5} held out: loss {found[-1].task:.3f}, kappa {found[-1].kappa:.1f}")
    for ax, name in zip(axes, ("task", "kappa"), strict=True):
        ax.plot(range(0, 121, 20), [getattr(f, name) for f in found], label=f"strength {strength:g}")
        ax.set(xlabel="step", ylabel=f"{'loss' if name == 'task' else name} of the next word, held out")
axes[0].legend()
figure.savefig("causal_lm.svg")
