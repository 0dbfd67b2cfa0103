"""What the default penalty is to a pretrained network in its first step: its share of the loss and of the gradient.

python docs/study/finetuning.py    MiniLM on film reviews, relflat data get minilm reviews; half a minute a seed
"""

import torch
from torch import Tensor, nn

from relflat import FAM
from relflat.lab.data import reviews
from relflat.lab.data.fetch import files
from relflat.lab.tasks.text import TOKENS, encode, minilm

BATCH, SIZES, SEEDS = 16, (0.004, 0.0004), (300, 301, 302)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """That of a loss by all parameters."""
    model.zero_grad()
    loss.backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def main() -> None:
    """Print one row a seed and size; both passes of a row have the same dropout masks."""
    films, criterion = reviews.sentences(files("reviews"))["films"], nn.CrossEntropyLoss()
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = minilm().train()
        rows = torch.randperm(len(films.texts), generator=torch.Generator().manual_seed(seed))[:BATCH].tolist()
        inputs = encode([films.texts[row] for row in rows], tokens=TOKENS)
        targets = torch.tensor([films.labels[row] for row in rows])
        torch.manual_seed(seed)
        task = gradient(model, criterion(model(**inputs), targets))
        for size in SIZES:
            torch.manual_seed(seed)
            with FAM(criterion, model, size=size, seed=seed) as fam:
                added = gradient(model, fam(model(**inputs), targets)) - task
                last, most = fam.last, max(fam.last["by_layer"].items(), key=lambda pair: pair[1])
            share = float(added.norm() / task.norm())
            print(
                f"seed {seed}  size {size:g}  loss {last['task']:.3f}  penalty {last['penalty']:.3f}  "
                f"factor of the bound {last['factor']:.2f}  gradient {share:.2f} of the task's  "
                f"kappa {last['kappa']:.0f}, of it {most[1]:.0f} {most[0]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
