"""Train with FAM in a plain loop: one line differs from ordinary training."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from relflat import FAM

x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
train, test = torch.arange(0, 1000), torch.arange(1000, len(x))

for strength in (0.0, 0.003, 0.03):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=strength)  # the line that differs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = criterion(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    task, penalty = criterion.last["task"], criterion.last["penalty"]
    print(f"strength {strength:<5} test accuracy {accuracy:.3f}; last step: task {task:.4f}, penalty {penalty:.4f}")
