"""The spectrum of a layer's Hessian.

Lanczos sees the density of all eigenvalues without writing the matrix out. After training a few of them stand apart
from a bulk at zero; the trace, and with it kappa, is mostly theirs.
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
    top = found.top.value
    at = torch.linspace(-0.1 * top, 1.1 * top, 240, dtype=torch.float64)
    ax.plot(at, found.size * found.density(at, width=0.01 * top), label=f"{name}, largest {top:.2g}")
    print(f"{name}: Tr H {found.trace.value:.3f}, largest eigenvalue {top:.3f} ± {found.top.stderr:.1g}")

ax.set(xscale="symlog", yscale="log", ylim=(1e-1, None))
ax.set(xlabel="eigenvalue, units of the loss / weight²", ylabel="eigenvalues per unit (log)")
ax.set_title("Hidden layer of an MLP on 1,797 digits: 4,096 eigenvalues, one seed")
ax.legend()
figure.savefig("spectrum.svg")
