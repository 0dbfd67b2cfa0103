"""A pretrained transformer, before you fine-tune it.

`suggest` says what FAM's penalty would be in MiniLM on film reviews, layer by layer, before a step is taken.
Kappa differs by decades between kinds of layers and with depth.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import relflat
from relflat.lab.tasks.text import minilm, read_reviews

reviews = read_reviews().pool
torch.manual_seed(0)
rows = torch.randperm(len(reviews.targets))[:24]
batch = {name: ids[rows] for name, ids in reviews.inputs.items()}, reviews.targets[rows]
model = minilm().eval()
found = relflat.suggest(model, nn.CrossEntropyLoss(), batch, layer="encoder.encoder.*")
print(*str(found).splitlines()[:4], "...", str(found).splitlines()[-1], sep="\n")

kinds = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "MLP, in",
    "output.dense": "MLP, out",
}
figure, ax = plt.subplots(figsize=(6.6, 3.6), layout="constrained")
for kind, title in kinds.items():
    flats = [found.flats[f"encoder.encoder.layer.{depth}.{kind}"] for depth in range(6)]
    values, errors = [f.value for f in flats], [f.stderr for f in flats]
    ax.errorbar(range(1, 7), values, errors, fmt="o-", markersize=4, capsize=2, label=title)
ax.set(yscale="log", xlabel="encoder layer", ylabel="kappa, units of the loss (± standard error)")
ax.set_title("MiniLM with a new output layer on 24 film reviews, one seed")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure.savefig("pretrained.svg")
