"""Regression with a squared error: reconstruct the lower half of a digit from its upper half."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, relative_flatness

images = torch.as_tensor(load_digits().data).float() / 16
upper, lower = images[:, :32], images[:, 32:]
train, test = torch.arange(0, 1000), torch.arange(1000, len(images))

for strength in (0.0, 0.01, 0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32))
    criterion = FAM(nn.MSELoss(), model, "output", strength=strength)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = criterion(model(upper[rows]), lower[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    error = nn.functional.mse_loss(model(upper[test]), lower[test])
    flat = relative_flatness(model, nn.MSELoss(), (upper[train], lower[train]), layer="output")
    print(f"strength {strength:<5} train error {flat.loss:.4f}, test error {error:.4f}, {flat}")
