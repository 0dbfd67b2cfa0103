"""Tasks on pictures. A new one is one more record here, and a row in docs/tasks.md."""

from dataclasses import replace
from functools import partial

from torch import nn

from relflat.lab.data.augment import crop_flip, crop_flip_cutout, cutout, shift
from relflat.lab.data.splits import classification
from relflat.lab.tasks.efficientnet import efficientnet_lite0
from relflat.lab.tasks.models import mlp, resnet18, resnet20, small_cnn, wide_resnet
from relflat.lab.tasks.task import SGD, AdamW, Task, cosine, linear, staircase

DIGITS = Task(
    name="digits",
    summary="8x8 digits shifted by up to a pixel, MLP 64-128-128-10; 897 train, 400 validation, 500 test",
    splits=partial(classification, "digits", validation=400, test=500),
    model=partial(mlp, 64),
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=SGD(lr=0.05, weight_decay=5e-4),
    schedule=cosine,
    epochs=80,
    batch_size=32,
    augment=partial(shift, pad=1),
)

FASHION_MNIST = Task(
    name="fashion-mnist",
    summary="28x28 clothes, small CNN; 55,000 train, 5,000 validation, the official 10,000 test",
    splits=partial(classification, "fashion-mnist", validation=5000, test=None),
    model=partial(small_cnn, in_channels=1),
    loss=nn.CrossEntropyLoss,
    layer="output",
    optimizer=SGD(lr=0.05, weight_decay=5e-4),
    schedule=cosine,
    epochs=25,
    batch_size=64,
)

FASHION_MNIST_RESNET18 = replace(
    FASHION_MNIST,
    name="fashion-mnist-resnet18",
    summary="28x28 clothes, ResNet-18 + Linear-64",
    model=partial(resnet18, in_channels=1, feature_width=64),
)

FASHION_MNIST_WRN = replace(
    FASHION_MNIST,
    name="fashion-mnist-wrn",
    summary="28x28 clothes with cutout, WRN-28-10 + Linear-64 and the FAM paper's schedule; for a GPU",
    model=partial(wide_resnet, in_channels=1),
    optimizer=SGD(lr=0.01, weight_decay=5e-4, nesterov=True),
    schedule=staircase,
    epochs=200,
    augment=cutout,
)

CIFAR10 = replace(
    FASHION_MNIST,
    name="cifar10",
    summary="32x32 pictures, small CNN; 45,000 train, 5,000 validation, the official 10,000 test",
    splits=partial(classification, "cifar10", validation=5000, test=None),
    model=partial(small_cnn, in_channels=3),
)

CIFAR10_RESNET20 = replace(
    CIFAR10,
    name="cifar10-resnet20",
    summary="32x32 pictures, shifted and mirrored, ResNet-20",
    model=resnet20,
    optimizer=SGD(lr=0.1, weight_decay=5e-4),
    epochs=15,
    batch_size=128,
    augment=crop_flip,
)

CIFAR10_RESNET18 = replace(
    CIFAR10,
    name="cifar10-resnet18",
    summary="32x32 pictures, shifted and mirrored, ResNet-18 + Linear-64, the FAM paper's budget; for a GPU",
    model=partial(resnet18, feature_width=64),
    optimizer=SGD(lr=0.03, weight_decay=5e-4),
    epochs=250,
    augment=crop_flip,
)

CIFAR10_WRN = replace(
    CIFAR10_RESNET20,
    name="cifar10-wrn",
    summary="32x32 pictures, shifted and mirrored, WRN-28-10 + Linear-64; for a GPU",
    model=wide_resnet,
    optimizer=SGD(lr=0.1, weight_decay=5e-4, nesterov=True),
    schedule=staircase,
    epochs=200,
)

CIFAR10_FINETUNE = replace(
    CIFAR10,
    name="cifar10-finetune",
    summary="32x32 pictures enlarged to 64x64, pretrained EfficientNet-Lite0",
    splits=partial(classification, "cifar10", validation=5000, test=None, standardise=False),
    model=efficientnet_lite0,
    optimizer=AdamW(lr=1e-3),
    schedule=linear,
    epochs=2,
    augment=crop_flip,
    evaluation_size=500,
)

CIFAR100 = replace(
    CIFAR10_RESNET20,
    name="cifar100",
    summary="32x32 pictures of 100 classes, shifted and mirrored, ResNet-20; from the Hugging Face hub",
    splits=partial(classification, "cifar100", validation=5000, test=None),
    model=partial(resnet20, num_classes=100),
    epochs=30,
)

CIFAR100_FINETUNE = replace(
    CIFAR10_FINETUNE,
    name="cifar100-finetune",
    summary="32x32 pictures of 100 classes enlarged to 64x64, pretrained EfficientNet-Lite0; from the hub",
    splits=partial(classification, "cifar100", validation=5000, test=None, standardise=False),
    model=partial(efficientnet_lite0, num_classes=100),
    epochs=5,
)

SVHN = replace(
    CIFAR10_RESNET20,
    name="svhn",
    summary="32x32 house numbers, shifted, ResNet-20; 68,257 train, 5,000 validation, the official 26,032 test; "
    "from the Hugging Face hub",
    splits=partial(classification, "svhn", validation=5000, test=None),
    augment=shift,
)

SVHN_WRN = replace(
    CIFAR10_WRN,
    name="svhn-wrn",
    summary="32x32 house numbers, WRN-28-10 + Linear-64, the FAM paper's schedule; from the hub, for a GPU",
    splits=SVHN.splits,
    epochs=100,
    augment=crop_flip_cutout,
)
