import copy

import pytest
import torch
from torch import nn

from relflat.errors import ConfigError
from relflat.lab.tasks import SGD
from relflat.lab.tasks.models import mlp, small_cnn
from relflat.lab.train.algorithms import ALGORITHMS
from relflat.lab.train.config import make
from relflat.lab.train.session import accelerator_for
from relflat.lab.train.steps import Learner
from relflat.theory.sharpness import kept


def learner(algorithm: str, model: nn.Module, lr: float = 0.1, momentum: float = 0.0, **settings) -> Learner:
    config = make({"task": "digits", "algorithm": algorithm, **settings})
    way = config.settings
    optimizer = way.optimizer(model.parameters(), SGD(lr=lr, momentum=momentum))
    accelerator = accelerator_for(config, None)
    model, optimizer = accelerator.prepare(model, optimizer)
    return Learner(accelerator, model, way.criterion(nn.CrossEntropyLoss(), model, 0), optimizer)


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def gradient(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), list(model.parameters())))


def test_sam_step_is_the_papers():
    """w <- w - lr g(w + rho g(w)/||g(w)||), written out."""
    inputs, targets = batch()
    model, by_hand = linear(), linear()
    losses = ALGORITHMS["sam"].step(learner("sam", model, rho=0.3), inputs, targets)
    first = gradient(by_hand, inputs, targets)
    norm = torch.sqrt(sum(g.square().sum() for g in first))
    uphill = copy.deepcopy(by_hand)
    with torch.no_grad():
        for parameter, g in zip(uphill.parameters(), first, strict=True):
            parameter += 0.3 * g / norm
        expected = [
            w - 0.1 * g for w, g in zip(by_hand.parameters(), gradient_at(uphill, inputs, targets), strict=True)
        ]
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert float(losses.total) == pytest.approx(nn.functional.cross_entropy(by_hand(inputs), targets).item())


def gradient_at(model, inputs, targets):
    with torch.enable_grad():
        return gradient(model, inputs, targets)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batchnorm_statistics_move_once_a_step(algorithm):
    torch.manual_seed(0)
    model = small_cnn()
    untouched = copy.deepcopy(model)
    inputs, targets = batch()
    without = {"dropout": {"rate": 0.0}, "noise": {"sigma": 0.0}}.get(algorithm, {})
    ALGORITHMS[algorithm].step(learner(algorithm, model.train(), **without), inputs, targets)
    untouched.train()(inputs)
    for (name, found), expected in zip(model.named_buffers(), untouched.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert int(model.get_submodule("bn1").num_batches_tracked) == 1


def test_buffers_are_put_back_after_an_error():
    model = small_cnn().train()
    before = copy.deepcopy(dict(model.named_buffers()))

    def fail():
        with kept(model.buffers()):
            model(batch()[0])
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_fam_without_strength_is_plain_training():
    inputs, targets = batch()
    plain, fam = small_cnn(), small_cnn()
    fam.load_state_dict(plain.state_dict())
    ALGORITHMS["plain"].step(learner("plain", plain), inputs, targets)
    ALGORITHMS["fam"].step(learner("fam", fam, strength=0.0), inputs, targets)
    for found, expected in zip(fam.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_fam_descends_the_regularised_loss():
    """One step of FAM changes the weights by -lr times the gradient of loss + strength * kappa (I1)."""
    inputs, targets = batch()
    model, by_hand = linear(), linear()
    losses = ALGORITHMS["fam"].step(learner("fam", model, strength=0.5, bound=None, layer="1"), inputs, targets)
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


def moved(algorithm: str, steps: int, **settings) -> tuple[list[torch.Tensor], int]:
    """Weights after so many steps on one batch, and the number of forward passes they took."""
    inputs, targets = batch()
    model = linear()
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    one = learner(algorithm, model, **settings)
    for _ in range(steps):
        ALGORITHMS[algorithm].step(one, inputs, targets)
    return list(model.parameters()), len(passes)


def test_looksam_passes_twice_only_when_it_is_time():
    assert [moved("looksam", steps, period=3)[1] for steps in (1, 2, 3, 4)] == [2, 3, 4, 6]


def test_first_step_of_looksam_is_sams():
    look, _ = moved("looksam", 1, rho=0.3, period=3)
    sam, _ = moved("sam", 1, rho=0.3)
    for found, expected in zip(look, sam, strict=True):
        torch.testing.assert_close(found, expected)


def test_second_step_of_looksam_adds_the_kept_direction():
    """g + alpha ||g|| / ||g_v|| g_v, with g_v the part of SAM's gradient orthogonal to the plain one."""
    inputs, targets = batch()
    by_hand = linear()
    first = gradient(by_hand, inputs, targets)
    norm = torch.sqrt(sum(g.square().sum() for g in first))
    uphill = copy.deepcopy(by_hand)
    with torch.no_grad():
        for w, g in zip(uphill.parameters(), first, strict=True):
            w += 0.3 * g / norm
    sharp = gradient(uphill, inputs, targets)
    kept = [s - (s * g).sum() / g.square().sum() * g for s, g in zip(sharp, first, strict=True)]
    with torch.no_grad():
        for w, s in zip(by_hand.parameters(), sharp, strict=True):
            w -= 0.1 * s
    second = gradient(by_hand, inputs, targets)
    expected = [
        w - 0.1 * (g + 0.7 * g.norm() / v.norm() * v)
        for w, g, v in zip(by_hand.parameters(), second, kept, strict=True)
    ]
    found, _ = moved("looksam", 2, rho=0.3, period=3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_label_smoothing_spreads_the_targets():
    inputs, targets = batch()
    found, _ = moved("smoothing", 1, smoothing=0.2)
    by_hand = linear()
    loss = nn.functional.cross_entropy(by_hand(inputs), targets, label_smoothing=0.2)
    for w, g, one in zip(
        by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), found, strict=True
    ):
        torch.testing.assert_close(one, w - 0.1 * g)
    config = make({"task": "digits", "algorithm": "smoothing"})
    with pytest.raises(ConfigError, match="CrossEntropyLoss, not MSELoss"):
        config.settings.criterion(nn.MSELoss(), by_hand, 0)


def test_all_layers_are_those_with_an_input():
    """A matrix that is a parameter of its own has none, and is no reason not to train."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(64, 20)), nn.Linear(20, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1) @ self.w)

    model, dropped = Projected(), []
    trained = learner("dropout", model, rate=0.5)
    model.head.register_forward_pre_hook(lambda module, args: dropped.append((args[0] == 0).float().mean().item()))
    trained.criterion(model(batch()[0]), batch()[1])
    assert dropped == [pytest.approx(0.5, abs=0.1)]


@pytest.mark.parametrize(
    ("algorithm", "settings"), [("dropout", {"rate": 0.5}), ("noise", {"sigma": 0.5})], ids=["dropout", "noise"]
)
def test_disturbance_acts_on_the_layers_inputs_while_training_only(algorithm, settings):
    inputs, _ = batch()
    model = mlp(64)
    before = model(inputs)
    seen = {}
    criterion = learner(algorithm, model, layer="fc2,output", **settings).criterion
    for name in ("fc1", "fc2", "output"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    assert torch.equal(model.eval()(inputs), before)
    clean = dict(seen)
    model.train()(inputs)
    assert torch.equal(seen["fc1"], clean["fc1"])
    assert not torch.equal(seen["fc2"], clean["fc2"])
    if algorithm == "dropout":
        kept = seen["fc2"] != 0
        torch.testing.assert_close(seen["fc2"][kept], 2 * clean["fc2"][kept])
    criterion.close()
    assert torch.equal(model(inputs), before)


def test_gaussian_noise_has_the_given_deviation():
    model, seen = mlp(64).train(), []
    learner("noise", model, layer="fc1", sigma=0.3)
    model.get_submodule("fc1").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(400, 1, 8, 8))
    assert seen[0].std().item() == pytest.approx(0.3, rel=0.05)


def test_fam_and_sam_together_count_one_step_and_draw_the_same_probes():
    inputs, targets = batch()
    settings = {"strength": 0.1, "layer": "fc2", "method": "probe", "rho": 0.0}
    both, alone = mlp(64), mlp(64)
    both.load_state_dict(alone.state_dict())
    one = learner("fam-sam", both, **settings)
    del settings["rho"]
    ALGORITHMS["fam-sam"].step(one, inputs, targets)
    ALGORITHMS["fam"].step(learner("fam", alone, **settings), inputs, targets)
    assert one.criterion.step == 1
    for found, expected in zip(both.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        ("dropout", {"rate": 1.0}, "rate=1.0 must lie between 0 and 1"),
        ("noise", {"sigma": -1.0}, "sigma=-1.0 must not be negative"),
        ("noise", {"layer": "output.weight"}, "is a parameter, which has no input"),
        ("smoothing", {"smoothing": 2.0}, "smoothing=2.0 must lie between 0 and 1"),
        ("looksam", {"period": 0}, "period=0 must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(algorithm, settings, message):
    with pytest.raises(ConfigError, match=message):
        learner(algorithm, mlp(64), **settings)
