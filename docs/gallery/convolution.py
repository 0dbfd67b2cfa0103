"""Regularise a convolution, and measure it: its weight counts as a matrix (out, in * k * k)."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, relative_flatness

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float().reshape(-1, 1, 8, 8) / 16
train, test = torch.arange(0, 1000), torch.arange(1000, len(x))

for strength in (0.0, 3e-4, 3e-3):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    criterion = FAM(nn.CrossEntropyLoss(), model, "2", strength=strength)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(4):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = criterion(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    flat = relative_flatness(model, nn.CrossEntropyLoss(), (x[train], y[train]), layer="2", curvature="ggn")
    print(f"strength {strength:<6} test accuracy {accuracy:.3f}, loss {flat.loss:.3f}, {flat}")
