"""A task of your own on a table: relflat compare docs/study/own_task.py:task."""

from functools import partial

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from relflat.lab.data import Arrays, RawData, classification
from relflat.lab.tasks import SGD, Task, cosine, mlp


def data() -> RawData:
    """569 tumours with 30 measurements each, benign or malignant; no official test set."""
    inputs, targets = load_breast_cancer(return_X_y=True)
    return RawData(Arrays(torch.as_tensor(inputs, dtype=torch.float32), torch.as_tensor(targets)), None, 2)


task = Task(
    name="breast-cancer",
    summary="30 measurements of a tumour, MLP 30-64-2; 299 train, 120 validation, 150 test",
    splits=partial(classification, data, validation=120, test=150),
    model=partial(mlp, 30, (64,), num_classes=2),
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=SGD(lr=0.05, weight_decay=5e-4),
    schedule=cosine,
    epochs=20,
    batch_size=32,
)
