"""What kappa does not see, and other measures do.

Dividing a layer's output by c and multiplying the next weight by c leaves a ReLU network as it is. The trace and the
largest eigenvalue can be made as small as one likes that way, and SAM's sharpness larger; kappa stays.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import measures, reparam

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
x = x.double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(5):
    for rows in torch.randperm(len(x)).split(50):
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

before, factors, found = model(x).detach(), [2.0**k for k in range(-4, 5)], []
for step in [factors[0], *[2.0] * (len(factors) - 1)]:  # each on top of what was done before
    reparam.rescale_layer(model[0], model[1], model[2], step)
    assert torch.allclose(model(x), before)  # the same function
    found.append(measures(model, nn.CrossEntropyLoss(), (x, y), draws=1, max_products=12))

as_trained = found[factors.index(1.0)]
figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
looks = {"kappa": "o-", "Tr H": "s-", "lambda_max(H)": "^--", "SAM sharpness": "D-"}
for name, look in looks.items():
    values = [each[name].value / as_trained[name].value for each in found]
    print(f"{name}: from {min(values):.3g} to {max(values):.3g} times what it was")
    ax.plot(factors, values, look, markersize=5, label=name)
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set(yscale="log", xlabel="c: weights of the output layer times c, its features divided by c")
ax.set(ylabel="measure, relative to c = 1 (log)", title="One function. MLP on 1,797 digits, one seed")
ax.legend()
figure.savefig("invariance.svg")
