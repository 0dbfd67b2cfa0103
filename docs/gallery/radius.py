"""A finite radius in place of kappa: noise on the features of the layers, which confidence does not hide."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, relative_flatness

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
torch.manual_seed(0)
noisy = torch.where(torch.rand(len(y)) < 0.2, torch.randint(10, y.shape), y)  # 20 % of labels redrawn
train, test = torch.arange(0, 900), torch.arange(900, len(x))

for radius in (None, 0.3, 0.6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    strength = 0.0 if radius is None else 1.0  # with 1 the forward pass itself is perturbed: no extra pass
    criterion = FAM(nn.CrossEntropyLoss(), model, ["0", "2"], strength=strength, radius=radius)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        for rows in train[torch.randperm(len(train))].split(30):
            loss = criterion(model(x[rows]), noisy[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    flat = relative_flatness(model, nn.CrossEntropyLoss(), (x[train], noisy[train]), layer="output")
    print(f"radius {radius}: test accuracy {accuracy:.3f}, {flat}, confidence {flat.confidence:.3f}")
