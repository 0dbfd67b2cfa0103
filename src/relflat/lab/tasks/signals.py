"""Tasks on signals in time. A new one is one more record here, and a row in docs/tasks.md."""

from functools import partial

from torch import nn

from relflat.lab.data.splits import classification
from relflat.lab.tasks.models import signal_cnn
from relflat.lab.tasks.task import AdamW, Task, cosine

MNIST1D = Task(
    name="mnist1d",
    summary="synthetic signals of length 40, three convolutions; 3,500 train, 500 validation, 1,000 test",
    splits=partial(classification, "mnist1d", validation=500, test=None),
    model=signal_cnn,
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=AdamW(lr=3e-3),
    schedule=cosine,
    epochs=40,
    batch_size=64,
)
