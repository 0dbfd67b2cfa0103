"""The trainings side by side that FAM's default was set with, held against the library."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from relflat import relative_flatness_by_layer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import screening


def sequential(nets: screening.Networks, which: int) -> nn.Sequential:
    layers = [nn.Linear(m, d) for m, d in zip(nets.sizes, nets.sizes[1:], strict=False)]
    with torch.no_grad():
        for layer, weight, bias in zip(layers, nets.parameters[::2], nets.parameters[1::2], strict=True):
            layer.weight.copy_(weight[which])
            layer.bias.copy_(bias[which, 0])
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


@pytest.mark.parametrize(("loss", "criterion"), [("cross-entropy", nn.CrossEntropyLoss()), ("squares", None)])
def test_kappas_are_those_of_the_library(loss, criterion):
    """Of two networks at once; in hidden layers on average over 4,000 directions for each of three samples."""
    nets = screening.Networks([0, 1], (4, 8, 8, 3), loss)
    torch.manual_seed(0)
    x, y = torch.randn(3, 4), torch.randint(3, (3,))
    many = x.repeat(4000, 1).expand(2, -1, -1)
    found = nets.kappas(nets.features(many), torch.Generator().manual_seed(0))
    targets = y if criterion is not None else nn.functional.one_hot(y, 3).float()
    for which in range(2):
        right = relative_flatness_by_layer(
            sequential(nets, which),
            criterion or nn.MSELoss(),
            (x, targets),
            layer="*",
            curvature="ggn",
            method="exact",
        )
        mine = torch.stack([kappa[which] for kappa in found])
        torch.testing.assert_close(mine, torch.tensor([f.value for f in right.values()]), rtol=0.05, atol=0)
        torch.testing.assert_close(mine[-1].item(), list(right.values())[-1].value, rtol=1e-5, atol=0)


def test_a_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screening, "EPOCHS", 5)
    monkeypatch.setattr(screening, "CANDIDATES", (screening.PLAIN, screening.fam(0.002, 0.1, 2), screening.SAM))
    monkeypatch.setattr(screening, "cells", lambda what: [screening.Cell("digits", 0.2, "sgd", 1.0, "cross-entropy")])
    out = tmp_path / "found.jsonl"
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["screening.py", "choose", "--out", str(out)])
        screening.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 * 4
    assert all(row["finite"] and row["accuracy"] > 0.5 for row in rows)
    bounded = {row["method"]: row["bounded"] for row in rows}
    assert bounded["plain"] == 0
    monkeypatch.setattr(sys, "argv", ["screening.py", "show", str(out)])
    capsys.readouterr()
    screening.main()
    assert "| digits 0.2 sgd 1 cross-entropy |" in capsys.readouterr().out
