"""A loss that relflat does not know.

Any scalar will do: `penalty(loss)` takes a focal loss that was computed elsewhere. With the default size a penalty is
taken every eighth step, and its bound keeps it a share of the loss, whatever units that has.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from relflat import FAM

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy that counts well-classified samples less (Lin et al. 2017)."""
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
fam = FAM(focal, model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
losses, penalties = [], {}
for _ in range(5):
    for rows in torch.randperm(len(x)).split(50):
        loss = focal(model(x[rows]), y[rows])  # computed wherever you like
        penalty = fam.penalty(loss)
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        losses.append(loss.item())
        if penalty > 0:
            penalties[len(losses)] = penalty.item()
    print(f"step {len(losses)}: loss {loss:.4f}, last penalty {penalties[max(penalties)]:.4f}")

figure, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
ax.plot(range(1, len(losses) + 1), losses, label="focal loss of the batch")
ax.plot(penalties.keys(), penalties.values(), "o", markersize=4, label="penalty that was added")
ax.set(
    yscale="log", xlabel="step", ylabel="focal loss, penalty (log)", title="MLP on digits, batches of 50, one seed"
)
ax.legend()
figure.savefig("custom_loss.svg")
