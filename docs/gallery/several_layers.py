"""Regularise several layers at once, chosen by a glob, and see each one's share."""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, relative_flatness_by_layer

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
torch.manual_seed(0)
model = nn.Sequential(OrderedDict(fc1=nn.Linear(64, 64), relu1=nn.ReLU(), fc2=nn.Linear(64, 64), relu2=nn.ReLU()))
model.add_module("head", nn.Linear(64, 10))

criterion = FAM(nn.CrossEntropyLoss(), model, ["fc*", "head"], strength=0.001)
print("regularised:", criterion.layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(10):
    for rows in torch.randperm(len(x)).split(50):
        loss = criterion(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print("last step:", {name: round(kappa, 2) for name, kappa in criterion.last["by_layer"].items()})

flats = relative_flatness_by_layer(model, nn.CrossEntropyLoss(), (x, y), layer="*", curvature="ggn")
for flat in flats.values():
    print(flat)
