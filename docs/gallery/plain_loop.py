"""Train with FAM in a plain loop, and watch kappa.

One line differs from ordinary training, and nothing is tuned; `Monitor` measures both networks as they train. A fifth
of the labels is wrong: plain training learns them by heart, and its kappa rises above that of FAM.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, Monitor

torch.manual_seed(0)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
noisy = torch.where(torch.rand(len(y)) < 0.2, torch.randint(10, y.shape), y)
train, test = torch.arange(0, 900), torch.arange(900, len(x))
cross_entropy = nn.CrossEntropyLoss()
figure, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")

for name in ("plain", "FAM"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    loss_fn = FAM(cross_entropy, model) if name == "FAM" else cross_entropy  # the line that differs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = Monitor(model, cross_entropy, (x[train], noisy[train]), every=60, curvature="ggn", probes=4)
    for _ in range(25):
        for rows in train[torch.randperm(len(train))].split(30):
            monitor()
            loss = loss_fn(model(x[rows]), noisy[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    steps, kappas = zip(*((step, flats.total) for step, flats in monitor.history), strict=True)
    ax.plot(steps, kappas, "o-", markersize=4, label=f"{name}: test accuracy {accuracy:.1%} at the end")
    print(f"{name}: test accuracy {accuracy:.3f}, kappa of all layers {kappas[-1]:.2f}")

ax.set(xlabel="step", ylabel="kappa of all layers, units of the loss")
ax.set_title("MLP on 900 digits, 20 % of labels redrawn, one seed")
ax.legend()
figure.savefig("plain_loop.svg")
