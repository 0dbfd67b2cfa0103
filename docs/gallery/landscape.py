"""The loss around a minimum, with and without FAM.

Along random linear changes of a layer's features the loss rises as kappa says, by the dashed parabola; further out it
does not. `loss_along` shows both, so that one sees how far the number can be trusted.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import relflat

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
cross_entropy, train, found = nn.CrossEntropyLoss(), torch.arange(1000), {}

for name in ("plain", "FAM"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    fam = relflat.FAM(cross_entropy, model, "output", strength=0.01, bound=None)
    loss_fn = fam if name == "FAM" else cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = loss_fn(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    along = relflat.loss_along(model, cross_entropy, (x[train], y[train]), layer="output", points=21)
    print(f"{name}: {along.flat}, loss {along.flat.loss:.3f}")
    found[name] = along

ax = relflat.plot.landscape(found, rise=True)
ax.figure.suptitle("Output layer, 1,000 digits, one seed, 8 directions", fontsize="medium")
ax.figure.savefig("landscape.svg")
