"""The stand-in for timm's training loop in docs/integrations/timm.md, with FAM in the place of its loss."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from relflat import FAM

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "timm.md"


@pytest.fixture(scope="module")
def timm():
    """What the page defines."""
    names: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1], names)
    return names


def net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batches(count=5, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, size, 3, 2, 2, generator=generator, dtype=dtype)
    return list(zip(x, torch.randint(4, (count, size), generator=generator), strict=True))


def penalised(model, x, y, strength=0.3):
    """Cross-entropy + strength kappa, from the formula alone."""
    phi, weight = model[:-1](x), model[-1].weight
    z = F.linear(phi, weight, model[-1].bias)
    p = z.softmax(-1)
    kappa = (phi.square().sum(1) * (p @ weight.square().sum(1) - (p @ weight).square().sum(1))).mean()
    return F.cross_entropy(z, y) + strength * kappa


def epoch(
    timm, model, criterion, loader, *, ema=None, scaler=None, optimizer=None, steps=1, clip=None, autocast=None
):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.2)
    scaler = scaler or timm["LossScaler"]("cpu")
    timm["train_one_epoch"](
        model, loader, optimizer, criterion, scaler, autocast or contextlib.nullcontext, ema, steps, clip
    )


@pytest.mark.parametrize(("steps", "clip"), [(1, None), (2, None), (2, 0.05), (5, 1.0)])
def test_steps_are_those_of_the_formula(timm, steps, clip):
    """With accumulation (a last incomplete one too), scaling and clipping."""
    model, loader = net(), batches()
    criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.3)
    epoch(timm, model, criterion, loader, steps=steps, clip=clip)
    expected = net()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.2)
    for start in range(0, 5, steps):
        x, y = (torch.cat(t) for t in zip(*loader[start : start + steps], strict=True))
        optimizer.zero_grad()
        penalised(expected, x, y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        optimizer.step()
    assert criterion.last["method"] == "closed_form"
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("before", [True, False])
def test_the_average_model_and_validation_are_plain(timm, before):
    model, loader = net(), batches()
    ema = timm["ModelEma"](model) if before else None
    criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.3)
    ema = ema or timm["ModelEma"](model)
    start = copy.deepcopy(ema.module.state_dict())
    epoch(timm, model, criterion, loader, ema=ema)
    assert any(not torch.equal(a, start[k]) for k, a in ema.module.state_dict().items())
    assert set(start) == set(net().state_dict())
    for one in (model, ema.module):
        plain = sum(F.cross_entropy(one(x), y).item() for x, y in loader) / len(loader)
        assert timm["validate"](one, loader, nn.CrossEntropyLoss()) == pytest.approx(plain)
    assert timm["validate"](model, loader, criterion) == pytest.approx(
        timm["validate"](model, loader, nn.CrossEntropyLoss())
    )


def test_mixup_targets(timm):
    """timm's loss for them is read from its graph and gives what torch's own gives."""

    class SoftTargetCrossEntropy(nn.Module):
        def forward(self, x, target):
            return -(target * x.log_softmax(-1)).sum(-1).mean()

    loader = [(x, 0.7 * F.one_hot(y, 4).double() + 0.3 * F.one_hot(y.flip(0), 4)) for x, y in batches()]
    found = []
    for loss_fn in (SoftTargetCrossEntropy(), nn.CrossEntropyLoss()):
        model = net()
        criterion = FAM(loss_fn, model, "output", strength=0.3, method="auto")
        epoch(timm, model, criterion, loader)
        found.append((model, criterion.last["method"]))
    assert [method for _, method in found] == ["closed_form", "closed_form"]
    for a, b in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_optimisers_of_second_order_can_differentiate_the_gradient(timm):
    class SecondOrder(torch.optim.SGD):
        is_second_order = True
        seen = 0

        def step(self, *args):
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            products = torch.autograd.grad(sum(g.sum() for g in grads), self.param_groups[0]["params"])
            type(self).seen += all(bool(p.isfinite().all()) for p in products)
            return super().step(*args)

    model = net()
    criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.3)
    optimizer = SecondOrder(model.parameters(), lr=0.1)
    epoch(timm, model, criterion, batches(2), optimizer=optimizer)
    assert SecondOrder.seen == 2


def test_overflow_in_half_precision_skips_the_step_and_no_more(timm):
    """The first scale is far too large: weights stay, then the scale fits and training goes on, without a nan."""
    model, loader = net(torch.float32), batches(dtype=torch.float32)
    criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.3)
    scaler = timm["LossScaler"]("cpu")
    scaler.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-10)
    start, seen = [p.detach().clone() for p in model.parameters()], []
    for batch in loader:
        half = lambda: torch.autocast("cpu", torch.float16)
        epoch(timm, model, criterion, [batch], scaler=scaler, clip=1.0, autocast=half)
        seen.append(all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)))
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert criterion.last["kappa"] > 0
    assert seen[0]
    assert not seen[-1]
    assert criterion.last["skipped"] == 0
