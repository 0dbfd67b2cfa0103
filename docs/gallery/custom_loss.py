"""A loss that relflat does not know, through ``penalty(loss)``: any scalar will do."""

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
fam = FAM(focal, model, "output", strength=0.01, curvature="hessian")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(1, 6):
    for rows in torch.randperm(len(x)).split(50):
        loss = focal(model(x[rows]), y[rows])  # computed wherever you like
        loss = loss + fam.penalty(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = fam.last
    print(f"epoch {epoch}: task {last['task']:.4f}, penalty {last['penalty']:.4f} by {last['method']}")
