"""A finite radius: its noise ends with the criterion, and a draw of zero is harmless."""

import gc
from collections.abc import Callable

import pytest
import torch
from small import data, mlp
from torch import Tensor, nn

from relflat.estimate.radius import Noise
from unbounded import FAM

CE = nn.CrossEntropyLoss


def test_dropping_the_criterion_stops_its_noise_at_once() -> None:
    net, (x, _) = mlp(), data()
    clean = net(x)
    gc.disable()
    try:
        fam = FAM(CE(), net, "0", strength=1.0, radius=0.5)
        assert not torch.equal(net(x), clean)
        del fam
        assert torch.equal(net(x), clean)
    finally:
        gc.enable()


def test_a_draw_of_exactly_zero_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = nn.Linear(1, 3), torch.randint(3, (8,))
    monkeypatch.setattr("relflat.rng.Rng.normal", lambda self, like: torch.zeros_like(like))
    fam = FAM(CE(), net, "output", strength=1.0, radius=0.5)
    assert torch.isfinite(fam(net(torch.randn(8, 1)), y))


class Ends(nn.Module):
    """A layer, and what is done with its output."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(4, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layer(x))


@pytest.mark.parametrize(
    "end",
    [
        *(lambda z: z.relu_(), lambda z: z.mul_(2.0), lambda z: z.relu(), lambda z: z.mT.mT),
        *(lambda z: 2 * z, lambda z: z.clone().relu_(), lambda z: z.flip(1)),
    ],
)
def test_what_is_done_with_the_output_is_done_with_the_perturbed_one_too(end: Callable[[Tensor], Tensor]) -> None:
    x, y, net = torch.randn(6, 4), torch.randint(3, (6,)), Ends(end)
    with FAM(CE(), net, "layer", strength=0.5, radius=0.5, seed=1) as fam:
        fam(net(x), y)
        found = fam.last["kappa"]
        change = Noise.of(fam.options, 1, 0).change(net.layer, x)
    with torch.no_grad():
        want = CE()(net(x + change), y) - CE()(net(x), y)
    assert found == pytest.approx(float(want), rel=1e-4)
