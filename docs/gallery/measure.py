"""Kappa before, during and after plain training.

It rises while the network learns and then falls as the network grows sure of itself, without any penalty. This is why
it is never printed without its companions: loss, confidence and the norm of the weight.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import Flatness, relative_flatness

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
flats: list[Flatness] = []


def measure(epoch: int) -> None:
    """Keep kappa and the numbers that it depends on, and print them now and then."""
    flat = relative_flatness(model, nn.CrossEntropyLoss(), (x, y), layer="output")
    flats.append(flat)
    if epoch in (0, 1, 5, 30):
        print(
            f"after {epoch:>2} epochs: kappa {flat.value:.3f}, loss {flat.loss:.3f}, "
            f"confidence {flat.confidence:.3f}, ||W|| {flat.weight_norm:.2f}"
        )


measure(0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(1, 31):
    for rows in torch.randperm(len(x)).split(50):
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measure(epoch)

figure, axes = plt.subplots(1, 3, figsize=(7.6, 2.6), layout="constrained")
shown = {"value": "kappa, units of the loss", "loss": "training loss", "confidence": "mean confidence"}
for place, (ax, (number, label)) in enumerate(zip(axes, shown.items(), strict=True)):
    ax.plot([getattr(flat, number) for flat in flats], color=f"C{place}")
    ax.set(xlabel="epoch", ylabel=label)
figure.suptitle("Output layer of an MLP on 1,797 digits, plain training, one seed", fontsize="medium")
figure.savefig("measure.svg")
