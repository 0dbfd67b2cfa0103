"""Measure the relative flatness of a network before and after training, never without its companions."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import relative_flatness

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def report(when: str) -> None:
    """Print kappa beside the numbers that it depends on."""
    flat = relative_flatness(model, nn.CrossEntropyLoss(), (x, y), layer="output")
    print(
        f"{when}: kappa {flat.value:.3f}, loss {flat.loss:.3f}, confidence {flat.confidence:.3f}, "
        f"||W|| {flat.weight_norm:.2f}, mean ||phi||^2 {flat.feature_norm2:.2f}"
    )


report("before training")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(1, 31):
    for rows in torch.randperm(len(x)).split(50):
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch in (1, 5, 30):
        report(f"after {epoch:>2} epochs ")
