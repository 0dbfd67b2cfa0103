"""Arguments that several commands have."""

from typing import Annotated

import tyro

TASKS = (
    "digits, fashion-mnist, fashion-mnist-resnet18, fashion-mnist-wrn, cifar10, cifar10-resnet20, cifar10-resnet18, "
    "cifar10-wrn, cifar10-finetune, cifar100, cifar100-finetune, svhn, svhn-wrn, mnist1d, skulls, skulls-unet, "
    "addition, addition-transformer, reviews, rte, mrpc, sst2"
)  # written out, so that the help of other commands need not import the tasks

TaskName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="TASK",
        help="path/to/file.py:name for a task of your own (docs/study/own-task.md), or a built-in one "
        f"(docs/tasks.md): {TASKS}.",
    ),
]
