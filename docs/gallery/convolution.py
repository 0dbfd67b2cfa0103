"""A convolution: how much penalty is too much.

The weight of a convolution counts as a matrix (out, in * k * k). Its kappa falls with the strength of the penalty,
and the test accuracy stays where it is for long: flatter is not better here.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM, relative_flatness

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float().reshape(-1, 1, 8, 8) / 16
train, test = torch.arange(0, 1000), torch.arange(1000, len(x))
strengths, found = (0.0, 0.01, 0.1, 1.0), []

for strength in strengths:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    loss_fn = FAM(nn.CrossEntropyLoss(), model, "2", strength=strength, bound=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(4):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = loss_fn(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
    flat = relative_flatness(model, nn.CrossEntropyLoss(), (x[train], y[train]), layer="2", curvature="ggn")
    found.append((flat.value, 100 * accuracy, flat.stderr))
    print(f"strength {strength:<6} test accuracy {accuracy:.3f}, loss {flat.loss:.3f}, {flat}")

kappa, accuracy, error = zip(*found, strict=True)
figure, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
ax.errorbar(kappa, accuracy, xerr=error, fmt="o-", capsize=2)
for strength, *at in zip(strengths, kappa, accuracy, strict=True):
    ax.annotate(f"{strength:g}", at, (0, 7), textcoords="offset points", ha="center")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set(xlabel="kappa of the second convolution (log; ± standard error)", ylabel="test accuracy, %")
ax.set_title("By strength of the penalty. CNN on 1,000 digits, 797 to test, one seed")
ax.margins(y=0.15)
figure.savefig("convolution.svg")
