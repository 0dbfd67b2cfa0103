"""Which samples are sharp.

Kappa of the layer is the mean of kappa of each sample's own loss. The sharpest are the doubtful ones; the flattest
are those of which the network is sure, right or wrong.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import relflat
from relflat.lab.data import read

clothes = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
data = read("fashion-mnist")
x, y = data.pool.inputs[:6000], data.pool.targets[:6000]
images, labels = data.test.inputs[:1000], data.test.targets[:1000]
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(4):
    for rows in torch.randperm(len(x)).split(100):
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

kappa = relflat.per_sample_flatness(model, nn.CrossEntropyLoss(), (images, labels), layer="output")
order = kappa.argsort(descending=True)
probability, said = model(images).softmax(1).max(1)
figure = plt.figure(figsize=(7.6, 5.8), layout="constrained")
curve, pictures = figure.subfigures(2, 1, height_ratios=(1.5, 1))
relflat.plot.samples(kappa, names=[clothes[k] for k in labels], extremes=3, ax=curve.subplots())
for place, (word, which) in enumerate({"sharpest": order[:6], "flattest": order[-6:]}.items()):
    print(f"{word}: kappa from {kappa[which].min():.3g} to {kappa[which].max():.3g}")
    for k, i in enumerate(which.tolist()):
        ax = pictures.add_subplot(2, 6, 6 * place + k + 1)
        ax.imshow(images[i, 0], cmap="gray_r", interpolation="none")
        ax.set_title(f"{clothes[labels[i]]}: {clothes[said[i]]} {probability[i]:.2f}", fontsize=7)
        ax.axis("off")
figure.suptitle(
    "1,000 test pictures of Fashion-MNIST, MLP, one seed. Below: label, answer, confidence", fontsize="medium"
)
figure.savefig("samples.svg")
