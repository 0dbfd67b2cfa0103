"""Losses read from their graph get the same closed forms as by (outputs, targets)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import DEVICE
from relflat import reference
from relflat.errors import GraphError
from relflat.loss.reading import read_loss
from unbounded import FAM


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def tokens() -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (4, 5))
    y[0, 1] = -100
    return torch.randn(4, 5, 6), y


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y.clamp(min=0), 3).double()


def shifted(y: Tensor) -> Tensor:
    return F.pad(y, (0, 1), value=-100)[:, 1:]


READ = {
    "flattened": lambda z, y: F.cross_entropy(z.view(-1, 3), y.view(-1)),
    "classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y, weight=torch.tensor([1.0, 2, 3])),
    "sum over tokens of several batches": lambda z, y: (
        F.cross_entropy(z.view(-1, 3), y.view(-1), reduction="sum") / torch.tensor(77) * 1024.0
    ),
    "accumulated, scaled": lambda z, y: torch.tensor(8.0) * (F.cross_entropy(z.view(-1, 3), y.view(-1)) / 4),
    "shifted by padding": lambda z, y: F.cross_entropy(
        z.view(-1, 3), F.pad(y, (0, 1), value=-100)[:, 1:].reshape(-1)
    ),
    "shifted by slicing": lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, 3), y[:, 1:].reshape(-1)),
    "last token": lambda z, y: F.cross_entropy(z[torch.arange(4), torch.tensor([1, 0, 2, 4])], y[:, 0]),
    "first token": lambda z, y: F.cross_entropy(z[:, 0], y[:, 0]),
    "other ignored index": lambda z, y: F.cross_entropy(z.view(-1, 3), y.view(-1).clamp(min=0), ignore_index=2),
    "own log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z.view(-1, 3), -1), y.view(-1)),
    "own log_softmax of tokens": lambda z, y: F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), y.view(-1)),
    "smoothed": lambda z, y: F.cross_entropy(z.reshape(-1, 3), y.reshape(-1), label_smoothing=0.1),
    "bce": lambda z, y: 3 * F.binary_cross_entropy_with_logits(z, one_hot(y), pos_weight=torch.tensor([1.0, 2, 3])),
    "mse": lambda z, y: F.mse_loss(z, one_hot(y), reduction="sum") / 9,
}
NOT_READ = {
    "a sum of two losses": lambda z, y: F.cross_entropy(z.view(-1, 3), y.view(-1)) + z.square().mean(),
    "negative": lambda z, y: -2 * F.cross_entropy(z.view(-1, 3), y.view(-1)),
    "scaled by the model": lambda z, y: F.cross_entropy(z.view(-1, 3), y.view(-1)) * z.mean(),
    "logits changed": lambda z, y: F.cross_entropy(3 * z.reshape(-1, 3), y.reshape(-1)),
    "twice the same token": lambda z, y: F.cross_entropy(z[:, [0, 0]].reshape(-1, 3), y[:, 1:3].reshape(-1)),
    "tokens in another order": lambda z, y: F.cross_entropy(z[:, [1, 0]].reshape(-1, 3), y[:, :2].reshape(-1)),
}


def penalty_and_gradient(method: str, loss_of) -> tuple[float, list[Tensor], str]:
    torch.manual_seed(0)
    model = net()
    x, y = tokens()
    curvature = "ggn" if method == "auto" else "hessian"
    fam = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.5, method=method, curvature=curvature)
    penalty = fam.penalty(loss_of(model(x), y))
    return (penalty.item(), list(torch.autograd.grad(penalty, list(model.parameters())[:3])), fam.last["method"])


def dense(loss_of) -> float:
    """Kappa of the output layer by Definition 3, its Hessian by double backward of the loss."""
    torch.manual_seed(0)
    model = net()
    x, y = tokens()
    phi, weight = model[:2](x).detach(), model[2].weight.detach()
    H = torch.autograd.functional.hessian(lambda W: loss_of(F.linear(phi, W, model[2].bias.detach()), y), weight)
    return float(reference.kappa_of_hessian(weight, H))


@pytest.mark.parametrize("name", READ)
def test_a_loss_that_is_read_has_the_closed_form_of_its_hessian(name) -> None:
    value, gradient, method = penalty_and_gradient("auto", READ[name])
    exact, expected, _ = penalty_and_gradient("exact", READ[name])
    assert method == "closed_form"
    assert value == pytest.approx(exact, rel=1e-10)
    assert value == pytest.approx(0.5 * dense(READ[name]), rel=1e-10)
    for mine, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:kappa of layer:relflat.RelflatWarning")
@pytest.mark.parametrize("name", NOT_READ)
def test_anything_else_is_left_to_autograd_and_stays_exact(name) -> None:
    value, _, method = penalty_and_gradient("auto", NOT_READ[name])
    exact, _, _ = penalty_and_gradient("exact", NOT_READ[name])
    assert method in ("exact", "probe(hessian, 1)", "probe(ggn, 1)")
    assert exact == pytest.approx(0.5 * dense(NOT_READ[name]), rel=1e-10)
    if method == "exact":
        assert value == pytest.approx(exact, rel=1e-10)


def test_hidden_layers_use_what_was_read() -> None:
    """The Gauss-Newton probes need the logits; without them one would have to name the Hessian."""
    x, y = tokens()
    model = net()
    fam = FAM(nn.CrossEntropyLoss(), model, "0", strength=1.0, probes=400)
    exact = FAM(nn.CrossEntropyLoss(), model, "0", strength=1.0, method="exact")
    value = fam.penalty(READ["shifted by slicing"](model(x), y)).item()
    assert fam.last["method"] == "probe(ggn, 400)"
    z = model(x)
    assert value == pytest.approx(exact(z.movedim(-1, 1), shifted(y)).item() - exact.last["task"], rel=0.15)


def test_autocast_casts_are_seen_through() -> None:
    model = net().float()
    x, y = tokens()
    fam = FAM(nn.CrossEntropyLoss(), model, "output", strength=1.0)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x.float()).view(-1, 3), y.view(-1))
    penalty = fam.penalty(loss)
    assert fam.last["method"] == "closed_form"
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        direct = fam(model(x.float()).movedim(-1, 1), y)
    assert penalty.item() == pytest.approx(direct.item() - fam.last["task"], rel=1e-2)


def test_a_loss_that_is_not_finite_is_not_read() -> None:
    z = torch.full((2, 3), torch.inf, requires_grad=True)
    assert read_loss(F.cross_entropy(z, torch.tensor([0, 1])), []) is None


class TestWatch:
    """For trainers that never call the model as a whole."""

    def test_parts_of_the_model_run_on_their_own(self) -> None:
        model, (x, y) = net(), tokens()
        fam = FAM(nn.CrossEntropyLoss(), model, "output", strength=1.0)
        fam.watch()
        loss = F.cross_entropy(model[2](model[1](model[0](x))).view(-1, 3), y.view(-1))
        watched = fam.penalty(loss)
        assert fam.layers == ["2"]
        fam.reset()
        assert watched.item() == fam.penalty(F.cross_entropy(model(x).view(-1, 3), y.view(-1))).item()

    def test_several_losses_each_get_their_own(self) -> None:
        model, (x, y) = net(), tokens()
        fam = FAM(nn.CrossEntropyLoss(), model, "2", strength=1.0)
        fam.watch()
        hidden = model[0](x)
        assert fam.penalty(hidden.square().mean()).item() == 0.0
        z = model[2](model[1](hidden)).view(-1, 3)
        one, two = (fam.penalty(c * F.cross_entropy(z, y.view(-1))).item() for c in (1, 2))
        assert two == pytest.approx(2 * one)

    def test_reset_ends_it(self) -> None:
        model, (x, y) = net(), tokens()
        fam = FAM(nn.CrossEntropyLoss(), model, "2", strength=1.0)
        fam.watch()
        loss = F.cross_entropy(model(x).view(-1, 3), y.view(-1))
        fam.reset()
        with pytest.raises(GraphError, match="no training forward pass"):
            fam.penalty(loss)
