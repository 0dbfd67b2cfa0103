import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from relflat.lab.config import make
from relflat.lab.methods import METHODS, Learner, buffers_kept
from relflat.lab.models import small_cnn
from relflat.lab.tasks import SGD


def learner(method: str, model: nn.Module, lr: float = 0.1, momentum: float = 0.0, **settings) -> Learner:
    config = make({"task": "digits", "method": method, **settings})
    way = METHODS[method]
    optimizer = way.optimizer(model.parameters(), SGD(lr=lr, momentum=momentum), config.settings)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return Learner(
        accelerator, model, way.criterion(nn.CrossEntropyLoss(), model, config.settings, 0), optimizer
    )


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def gradient(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), list(model.parameters()))
    )


def test_sam_step_is_the_papers():
    """w <- w - lr g(w + rho g(w)/||g(w)||), written out."""
    inputs, targets = batch()
    model, by_hand = linear(), linear()
    losses = METHODS["sam"].step(learner("sam", model, rho=0.3), inputs, targets)
    first = gradient(by_hand, inputs, targets)
    norm = torch.sqrt(sum(g.square().sum() for g in first))
    uphill = copy.deepcopy(by_hand)
    with torch.no_grad():
        for parameter, g in zip(uphill.parameters(), first, strict=True):
            parameter += 0.3 * g / norm
        expected = [
            w - 0.1 * g
            for w, g in zip(by_hand.parameters(), gradient_at(uphill, inputs, targets), strict=True)
        ]
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert float(losses.total) == pytest.approx(nn.functional.cross_entropy(by_hand(inputs), targets).item())


def gradient_at(model, inputs, targets):
    with torch.enable_grad():
        return gradient(model, inputs, targets)


@pytest.mark.parametrize("method", METHODS)
def test_batchnorm_statistics_move_once_a_step(method):
    torch.manual_seed(0)
    model = small_cnn()
    untouched = copy.deepcopy(model)
    inputs, targets = batch()
    METHODS[method].step(learner(method, model.train()), inputs, targets)
    untouched.train()(inputs)
    for (name, found), expected in zip(model.named_buffers(), untouched.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert int(model.get_submodule("bn1").num_batches_tracked) == 1


def test_buffers_are_put_back_after_an_error():
    model = small_cnn().train()
    before = copy.deepcopy(dict(model.named_buffers()))

    def fail():
        with buffers_kept(model):
            model(batch()[0])
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_fam_without_strength_is_plain_training():
    inputs, targets = batch()
    plain, fam = small_cnn(), small_cnn()
    fam.load_state_dict(plain.state_dict())
    METHODS["plain"].step(learner("plain", plain), inputs, targets)
    METHODS["fam"].step(learner("fam", fam, strength=0.0), inputs, targets)
    for found, expected in zip(fam.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_fam_descends_the_regularised_loss():
    """One step of FAM changes the weights by -lr times the gradient of loss + strength * kappa (I1)."""
    inputs, targets = batch()
    model, by_hand = linear(), linear()
    losses = METHODS["fam"].step(learner("fam", model, strength=0.5, regularize="1"), inputs, targets)
    phi, weight = inputs.flatten(1), by_hand[1].weight
    logits = by_hand(inputs)
    p = logits.softmax(1)
    mean = p @ weight
    kappa = (phi.square().sum(1) * (p @ weight.square().sum(1) - mean.square().sum(1))).mean()
    total = nn.functional.cross_entropy(logits, targets) + 0.5 * kappa
    grads = torch.autograd.grad(total, list(by_hand.parameters()))
    for found, w, g in zip(model.parameters(), by_hand.parameters(), grads, strict=True):
        torch.testing.assert_close(found, w - 0.1 * g)
    assert float(losses.penalty) == pytest.approx(0.5 * kappa.item(), rel=1e-5)
