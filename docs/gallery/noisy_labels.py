"""Noisy labels: test accuracy by epoch.

A fifth of the training labels is drawn anew, and plain training memorises them. FAM without a choice, and a finite
radius on the same layers (noise that confidence does not hide), hold on to more of what was learned first.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
train, test, seeds, epochs = torch.arange(0, 900), torch.arange(900, len(x)), (0, 1, 2), 25
cross_entropy = nn.CrossEntropyLoss()


def accuracies(arm: str, seed: int) -> list[float]:
    """Test accuracy after each epoch, %."""
    torch.manual_seed(seed)
    noisy = torch.where(torch.rand(len(y)) < 0.2, torch.randint(10, y.shape), y)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    loss_fn = {
        "plain": lambda: cross_entropy,
        "FAM": lambda: FAM(cross_entropy, model),
        # with strength 1 the forward pass itself is perturbed: no extra pass
        "finite radius .6": lambda: FAM(cross_entropy, model, ["0", "2"], strength=1.0, radius=0.6),
    }[arm]()
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(epochs):
        model.train()
        for rows in train[torch.randperm(len(train))].split(30):
            loss = loss_fn(model(x[rows]), noisy[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        found.append(100 * float((model(x[test]).argmax(1) == y[test]).float().mean()))
    return found


figure, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
for arm in ("plain", "FAM", "finite radius .6"):
    runs = torch.tensor([accuracies(arm, seed) for seed in seeds])
    print(f"{arm}: {runs[:, -1].mean():.1f} % after {epochs} epochs, {runs.max(1).values.mean():.1f} % at best")
    (line,) = ax.plot(range(1, epochs + 1), runs.mean(0), label=arm)
    ax.fill_between(range(1, epochs + 1), runs.min(0).values, runs.max(0).values, color=line.get_color(), alpha=0.15)
ax.set_ylim(75, 96)
ax.set(
    xlabel="epoch", ylabel="test accuracy, %", title="MLP, 900 digits, 20 % of labels redrawn; mean, range of 3 seeds"
)
ax.legend()
figure.savefig("noisy_labels.svg")
