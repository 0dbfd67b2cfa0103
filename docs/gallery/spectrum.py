"""The spectrum of a layer's Hessian.

Lanczos sees the density of all eigenvalues without writing the matrix out. Of thousands a few dozen carry the trace,
and with it kappa; they grow while the network learns, and shrink as it gets sure.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat.landscape import layer_spectrum

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.double() / 16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
figure, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")

sizes = torch.logspace(-5, 1, 200, dtype=torch.float64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epochs in (0, 1, 9):
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    name = f"after {epochs and epochs + epochs // 9} epochs"
    found = layer_spectrum(model, nn.CrossEntropyLoss(), (x, y), layer="2", draws=2, max_products=40)
    above = found.weights * (found.values > sizes[:, None, None])  # the share of each start's spectrum
    count = found.size * above.nansum((1, 2)) / len(found.values)
    ax.plot(sizes, count, label=f"{name}: Tr H {found.trace.value:.2g}, largest {found.top.value:.2g}")
    print(f"{name}: Tr H {found.trace.value:.3f}, largest eigenvalue {found.top.value:.3f}")

ax.set(xscale="log", yscale="log", ylim=(0.5, None))
ax.set(xlabel="eigenvalue, units of the loss / weight² (log)", ylabel="how many are larger (log)")
ax.set_title(f"Hidden layer of an MLP on 1,797 digits: {found.size:,} eigenvalues, one seed")
ax.legend()
figure.savefig("spectrum.svg")
