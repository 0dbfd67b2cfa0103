"""How large the penalty is: size or strength, the bound, and penalties that come now and then."""

import copy
import math
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from relflat import FAM, ConfigError
from relflat.sizing import BOUND, EVERY, SIZE

CE = nn.CrossEntropyLoss


def network(seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        net[-1].weight.mul_(scale)
    return net


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def kappa_of_output(net: nn.Sequential, x: Tensor) -> Tensor:
    """Of the last layer, by the definition's trace over the Hessian of the mean cross-entropy on paper."""
    phi, weight = net[:-1](x), net[-1].weight
    p = net[-1](phi).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return (phi.square().sum(-1) * torch.einsum("im,jm,nij->n", weight, weight, hessian)).mean()


def gradients(net: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def test_nothing_need_be_chosen():
    net = network()
    with FAM(CE(), net) as fam:
        loss = fam(net(batch()[0]), batch()[1])
        assert fam.layers == ["0", "2", "4"]
        assert (fam.size, fam.strength) == (SIZE, None)
        assert fam.last["strength"] == pytest.approx(SIZE / 3)
        assert fam.last["penalty"] == pytest.approx(EVERY * SIZE * fam.last["kappa"] / 3)
        assert loss.item() == pytest.approx(fam.last["task"] + fam.last["penalty"])
        assert f"size={SIZE}, bound={BOUND}, every={EVERY}" in repr(fam)


def test_counts_of_training_are_there_after_a_validation():
    net, (x, y) = network(), batch()
    with FAM(CE(), net, every=2, bound=1e-6) as fam:
        assert fam.last == {}
        for _ in range(3):
            fam(net(x), y).backward()
        trained = fam.last
        net.eval()
        plain = fam(net(x), y)
        assert fam.last["total"] == fam.last["task"] == plain.item()
        counts = ("bounded", "penalties", "skipped", "factor", "size", "collapsed")
        assert {k: fam.last[k] for k in counts} == {k: trained[k] for k in counts}
        assert (fam.last["penalty"], fam.last["bounded"], fam.last["penalties"]) == (0.0, 2, 2)
        assert not {"strength", "kappa", "method"} & set(fam.last)


def test_size_is_the_strength_on_the_mean_over_layers():
    net, (x, y) = network(), batch()
    values = []
    for how in ({"size": 0.3}, {"layer": "*", "strength": 0.1}):
        with FAM(CE(), net, **how, bound=None, every=1, method="exact", seed=0) as fam:
            values.append(gradients(net, fam(net(x), y)))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_penalty_above_its_share_of_the_loss_is_scaled_down_by_a_constant(reduction, sign):
    """By the formula of cross-entropy's Hessian, whose gradient is taken by the definition alone."""
    net, (x, y) = network(scale=3.0), batch()
    n = len(x) if reduction == "sum" else 1
    task, kappa = nn.functional.cross_entropy(net(x), y), kappa_of_output(net, x)
    factor = 0.2 * task.item() / (5.0 * kappa.item())
    assert factor < 1
    right = n * gradients(net, task + sign * 5.0 * factor * kappa)
    with FAM(CE(reduction=reduction), net, "output", strength=sign * 5.0, bound=0.2) as fam:
        loss = fam(net(x), y)
        torch.testing.assert_close(gradients(net, loss.sum() / (len(x) if reduction == "none" else 1)), right)
        assert fam.last["factor"] == pytest.approx(factor)
        assert (fam.last["bounded"], fam.last["penalties"]) == (1, 1)
        assert fam.last["penalty"] == pytest.approx(sign * n * 0.2 * task.item())


def test_a_penalty_below_its_share_is_left_as_it_is():
    net, (x, y) = network(), batch()
    with FAM(CE(), net, "output", strength=1e-3) as fam:
        fam(net(x), y)
        assert fam.last["penalty"] == pytest.approx(1e-3 * kappa_of_output(net, x).item())
        assert (fam.last["factor"], fam.last["bounded"], fam.last["penalties"]) == (1.0, 0, 1)


def test_the_bound_is_on_unless_switched_off():
    net, (x, y) = network(scale=3.0), batch()
    kappa = kappa_of_output(net, x).item()
    for bound, right in ((None, 5.0 * kappa), (math.inf, 5.0 * kappa)):
        with FAM(CE(), net, "output", strength=5.0, bound=bound) as fam:
            fam(net(x), y)
            assert fam.last["penalty"] == pytest.approx(right)
    with FAM(CE(), net, "output", strength=5.0) as fam:
        fam(net(x), y)
        assert fam.last["penalty"] == pytest.approx(BOUND * fam.last["task"])


def test_the_bound_holds_for_a_loss_computed_elsewhere_too():
    net, (x, y) = network(scale=3.0), batch()
    found = []
    for by_penalty in (False, True):
        with FAM(CE(), net, "output", strength=5.0, bound=0.1) as fam:
            if by_penalty:
                task = nn.functional.cross_entropy(net(x), y)
                found.append(gradients(net, task + fam.penalty(task)))
            else:
                found.append(gradients(net, fam(net(x), y)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("every", [1, 3, 4])
def test_penalties_now_and_then_have_the_mean_of_all(every):
    """On one batch and one network that does not change."""
    net, (x, y) = network(), batch()
    task = nn.functional.cross_entropy(net(x), y)
    right = gradients(net, task + 0.1 * kappa_of_output(net, x))
    plain = gradients(net, nn.functional.cross_entropy(net(x), y))
    with FAM(CE(), net, "output", strength=0.1, bound=None, every=every) as fam:
        steps = [gradients(net, fam(net(x), y)) for _ in range(2 * every)]
    torch.testing.assert_close(torch.stack(steps).mean(0), right)
    assert sum(not torch.equal(step, plain) for step in steps) == 2


def test_the_bound_is_on_what_is_added():
    net, (x, y) = network(scale=3.0), batch()
    with FAM(CE(), net, "output", strength=5.0, every=4) as fam:
        fam(net(x), y)
        assert fam.last["penalty"] == pytest.approx(BOUND * fam.last["task"])


def test_a_size_may_change_from_step_to_step():
    net, (x, y) = network(), batch()
    with FAM(CE(), net, size=lambda step: 0.01 * step, every=1) as fam:
        sizes = []
        for _ in range(3):
            fam(net(x), y)
            sizes.append(fam.last["strength"])
        fam.size = 0.3
        fam(net(x), y)
        assert sizes == pytest.approx([0, 0.01 / 3, 0.02 / 3])
        assert fam.last["strength"] == pytest.approx(0.1)
        assert fam.last["size"] == 0.3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"strength": 0.1}, "name the layer"),
        ({"layer": "*", "strength": 0.1, "size": 0.1}, "both say how large"),
        ({"layer": "*", "radius": 0.1, "size": 0.1}, "a size itself"),
        ({"size": -0.1}, "size=-0.1"),
        ({"size": "large"}, "size='large'"),
        ({"size": lambda step: -1.0}, "at step 0, size=-1.0"),
        ({"bound": 0}, "bound=0"),
        ({"bound": "none"}, "None for no bound"),
        ({"bound": math.nan}, "bound=nan"),
    ],
)
def test_what_does_not_say_how_large_the_penalty_is(wrong, says):
    with pytest.raises(ConfigError, match=says):
        FAM(CE(), network(), **wrong)


def test_the_one_that_was_not_given_cannot_be_set():
    net = network()
    with FAM(CE(), net) as fam, pytest.raises(ConfigError, match="given as size"):
        fam.strength = 0.1
    with FAM(CE(), net, "output", strength=0.1) as fam, pytest.raises(ConfigError, match="given as strength"):
        fam.size = 0.1


@pytest.mark.slow
def test_the_bound_keeps_alive_what_dies_without_it():
    """Digits, MLP of width 128: too strong a penalty ends in a constant, a bounded one does not."""
    pixels, classes = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x, y = pixels[:800].float() / 16, classes[:800]
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    accuracy = {}
    for bound in (None, BOUND):
        net = copy.deepcopy(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.15, momentum=0.9)
        with FAM(CE(), net, size=0.01, every=8, bound=bound, seed=0) as fam, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(200):
                i = torch.arange(32 * step, 32 * step + 32) % len(x)
                optimizer.zero_grad()
                fam(net(x[i]), y[i]).backward()
                optimizer.step()
        accuracy[bound] = (net(x).argmax(1) == y).float().mean().item()
    assert accuracy[None] < 0.3
    assert accuracy[BOUND] > 0.7
