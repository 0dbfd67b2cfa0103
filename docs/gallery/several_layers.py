"""Several layers at once, chosen by a glob, and each one's share.

FAM regularises every layer that the globs name; `relative_flatness_by_layer` measures them in one pass over the data.
Bars are kappa with its standard error: hidden layers are estimated by probes, the output layer's is exact.
"""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn

import relflat

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
cross_entropy = nn.CrossEntropyLoss()


def measured(model: nn.Module) -> dict[str, relflat.Flatness]:
    """Kappa of every layer."""
    return relflat.relative_flatness_by_layer(model, cross_entropy, (x, y), layer="*", curvature="ggn", probes=8)


found = {}
for name in ("plain", "FAM"):
    torch.manual_seed(0)
    layers = OrderedDict(fc1=nn.Linear(64, 64), relu1=nn.ReLU(), fc2=nn.Linear(64, 64), relu2=nn.ReLU())
    model = nn.Sequential(layers | {"head": nn.Linear(64, 10)})
    found.setdefault("before training", measured(model))
    fam = relflat.FAM(cross_entropy, model, ["fc*", "head"], strength=0.003)
    loss_fn = fam if name == "FAM" else cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(50):
            loss = loss_fn(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found[f"after 10 epochs, {name}"] = measured(model)

print("regularised:", fam.layers)
print(found["after 10 epochs, FAM"])
ax = relflat.plot.layers(found)
ax.figure.suptitle("MLP on 1,797 digits, one seed", fontsize="medium")
ax.figure.savefig("several_layers.svg")
