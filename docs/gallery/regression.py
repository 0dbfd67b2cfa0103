"""Regression with a squared error.

A network draws the lower half of a digit from its upper half. Kappa falls with the strength of the penalty, and the
test error does not: flatter is not better here.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from relflat import FAM, relative_flatness

images = torch.as_tensor(load_digits().data).float() / 16
upper, lower = images[:, :32], images[:, 32:]
train, test = torch.arange(0, 1000), torch.arange(1000, len(images))
drawn: dict[str, Tensor] = {"as written": lower[test]}

for strength in (0.0, 0.01, 0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32))
    loss_fn = FAM(nn.MSELoss(), model, "output", strength=strength)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = loss_fn(model(upper[rows]), lower[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    found = model(upper[test]).detach()
    error = nn.functional.mse_loss(found, lower[test])
    flat = relative_flatness(model, nn.MSELoss(), (upper[train], lower[train]), layer="output")
    print(f"strength {strength:<5} train error {flat.loss:.4f}, test error {error:.4f}, {flat}")
    drawn[f"strength {strength:g}\nkappa {flat:.3g}\ntest error {error:.4f}"] = found

figure, axes = plt.subplots(len(drawn), 1, figsize=(7.6, 3.8), layout="constrained")
for ax, (name, halves) in zip(axes, drawn.items(), strict=True):
    digits = torch.cat([upper[test], halves], dim=1)[:12].view(-1, 8, 8)
    row = nn.functional.pad(digits, (0, 2)).transpose(0, 1).flatten(1)  # side by side
    ax.imshow(row, cmap="gray_r", interpolation="none", vmin=0, vmax=1)
    ax.axhline(3.5, color="C1", linewidth=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
figure.suptitle("Below the line: drawn by an MLP, 1,000 digits to train on, one seed", fontsize="medium")
figure.savefig("regression.svg")
