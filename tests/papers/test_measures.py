"""Each measure against its definition, written out once more and densely."""

import math

import pytest
import torch
from torch import nn

from relflat import reference
from relflat.papers.measures import MEASURES, Subject, accuracy, fisher_rao, pac_bayes
from relflat.theory.sharpness import kept

kappa, kappa_normalized, kappa_max, layerwise, trace, lambda_max, weight_norm, sam_sharpness = (
    MEASURES[name].of
    for name in ("kappa", "kappa_normalized", "kappa_max", "layerwise", "trace", "lambda_max", "weight_norm", "sam")
)


@pytest.fixture(params=["0", "2"])
def subject(request):
    """A small network after some training, and one of its layers."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(70, 4, dtype=torch.float64)
    y = (x @ torch.randn(4, 3, dtype=torch.float64)).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return Subject(net, x, y, request.param)


def test_those_of_the_layers_hessian(subject):
    loss, W = reference.at_layer(subject.model, nn.CrossEntropyLoss(), subject.inputs, subject.targets, subject.layer)
    H = reference.layer_hessian(loss, W).detach()
    square = H.reshape(W.numel(), W.numel())
    assert kappa(subject) == pytest.approx(float(reference.kappa(loss, W)), rel=1e-8)
    assert trace(subject) == pytest.approx(float(square.trace()), rel=1e-8)
    assert layerwise(subject) == pytest.approx(float(W.square().sum() * square.trace()), rel=1e-8)
    assert lambda_max(subject) == pytest.approx(float(torch.linalg.eigvalsh(square)[-1]), rel=1e-8)
    assert kappa_max(subject) == pytest.approx(float(reference.max_eigenvalue(loss, W)), rel=1e-6)
    assert weight_norm(subject) == pytest.approx(float(W.norm()), rel=1e-12)


def test_fisher_rao_is_the_second_moment_of_theta_grad(subject):
    parameters = list(subject.model.parameters())
    moments = []
    for x, y in zip(subject.inputs, subject.targets, strict=True):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(subject.model(x[None]), y[None]), parameters)
        moments.append(sum(float((g * p).sum()) for g, p in zip(gradients, parameters, strict=True)) ** 2)
    assert fisher_rao(subject) == pytest.approx(math.sqrt(sum(moments) / len(moments)), rel=1e-10)


def test_fisher_rao_has_liangs_closed_form_without_biases():
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    f = net(x)
    slope = f.softmax(1) - nn.functional.one_hot(y, 3)
    closed = 2 * float((slope * f).sum(1).square().mean().sqrt())  # (L + 1) = 2 layers of weights
    assert fisher_rao(Subject(net, x, y, "0")) == pytest.approx(closed, rel=1e-10)


def test_pac_bayes_noise_costs_a_tenth_of_the_accuracy(subject):
    sigma = pac_bayes(subject) ** -0.5
    generator = torch.Generator().manual_seed(0)

    def under_noise(sigma):
        generator.manual_seed(0)
        found = []
        for _ in range(10):
            with kept(subject.model.parameters()), torch.no_grad():
                for p in subject.model.parameters():
                    p += sigma * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                found.append(accuracy(subject))
        return sum(found) / len(found)

    wanted = accuracy(subject) - 0.1
    assert under_noise(sigma * 1.002) <= wanted <= under_noise(sigma / 1.002)


def test_sam_is_the_highest_point_of_the_ball_in_two_dimensions():
    net = nn.Linear(1, 2, bias=False).double()
    x, y = torch.randn(30, 1, dtype=torch.float64), torch.randint(2, (30,))
    subject = Subject(net, x, y, "")
    start = nn.functional.cross_entropy(net(x), y).item()
    around = []
    for angle in torch.linspace(0, 2 * math.pi, 2000, dtype=torch.float64):
        with kept(net.parameters()), torch.no_grad():
            net.weight += 0.05 * torch.stack([angle.cos(), angle.sin()])[:, None]
            around.append(nn.functional.cross_entropy(net(x), y).item() - start)
    assert sam_sharpness(subject) == pytest.approx(max(around), rel=1e-4)


def test_asam_does_not_see_the_scale_of_single_weights(subject):
    """Two nets with one function: the ball of the elementwise form follows the weights."""
    first = subject.model[0]
    names = ("sam", "asam")
    before = [MEASURES[name].of(subject) for name in names]
    with torch.no_grad():  # a reading of the inputs in other units
        first.weight *= 7.0
    other = Subject(subject.model, subject.inputs / 7.0, subject.targets, subject.layer)
    after = [MEASURES[name].of(other) for name in names]
    assert after[1] == pytest.approx(before[1], rel=1e-9)
    assert after[0] != pytest.approx(before[0], rel=0.05)


def test_a_feature_that_never_varies_does_not_count(subject):
    """A dead input with any weight at all: normalised kappa is that of the network without it."""
    first = subject.model[0]
    wider = nn.Linear(5, 5).double()
    with torch.no_grad():
        wider.weight[:, :4] = first.weight
        wider.weight[:, 4] = 100 * torch.randn(5, dtype=torch.float64)
        wider.bias.copy_(first.bias - 0.3 * wider.weight[:, 4])
    inputs = torch.cat([subject.inputs, torch.full((len(subject.inputs), 1), 0.3, dtype=torch.float64)], 1)
    model = nn.Sequential(wider, *subject.model[1:])
    other = Subject(model, inputs, subject.targets, subject.layer)
    expected = kappa_normalized(subject)
    assert kappa_normalized(other) == pytest.approx(expected, rel=1e-9)
    loss, W = reference.at_layer(subject.model, nn.CrossEntropyLoss(), subject.inputs, subject.targets, subject.layer)
    features = subject.inputs if subject.layer == "0" else subject.model[:2](subject.inputs).detach()
    normalized = reference.kappa_normalized(loss, W, features.std(0, correction=0))
    assert expected == pytest.approx(float(normalized.detach()), rel=1e-8)


def test_no_measure_moves_the_network(subject):
    before = [p.clone() for p in subject.model.parameters()]
    for measure in MEASURES.values():
        assert math.isfinite(measure.of(subject))
    assert all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True))
