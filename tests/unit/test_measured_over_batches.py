"""What is measured over several batches: errors, digits, ignored targets, outputs of changing form."""

import pytest
import torch
import torch.nn.functional as F
from small import data, mlp
from torch import nn

from relflat import GraphError, LossError, per_sample_flatness, relative_flatness

CE = nn.CrossEntropyLoss


@pytest.mark.parametrize("order", [(40, 5), (5, 40)])
def test_exact_and_sampled_batches_together_keep_their_error(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x):
            return self.head(self.body(x).tanh().mean(1))

    batches = [(torch.randn(6, t, 4).double(), torch.randint(3, (6,))) for t in sorted(order)]
    batches = batches if order[0] < order[1] else batches[::-1]
    exact = relative_flatness(Pooled(), CE(), batches, layer="body", method="exact").value
    mixed = relative_flatness(Pooled(), CE(), batches, layer="body", probes=400)
    assert 0 < mixed.stderr < abs(exact)
    assert abs(mixed.value - exact) < 4 * mixed.stderr
    assert "exact" in mixed.method
    assert "probe" in mixed.method


def test_rtol_is_met_from_a_single_probe_on() -> None:
    net, (x, y) = mlp(nn.Tanh()), data(40)
    flat = relative_flatness(net, CE(), (x, y), layer="0", method="probe", probes=1, rtol=0.2, curvature="ggn")
    assert 0 < flat.stderr <= 0.2 * flat.value


def test_a_constant_feature_is_not_divided_by_rounding() -> None:
    x, y = data(12)
    x[:, 2] = 0.1
    net = nn.Linear(4, 3).double()
    whole = relative_flatness(net, CE(), (x, y), layer="output", normalize_features=True).value
    for cut in ([7, 5], [3, 9], [1] * 12):
        batches = list(zip(x.split(cut), y.split(cut), strict=True))
        value = relative_flatness(net, CE(), batches, layer="output", normalize_features=True).value
        assert value == pytest.approx(whole, rel=1e-9)


def test_per_sample_values_of_an_unknown_sum() -> None:
    net, (x, y) = mlp(), data()
    known = per_sample_flatness(net, CE(reduction="sum"), (x, y), layer="output")
    unknown = per_sample_flatness(
        net, lambda o, t: F.cross_entropy(o, t, reduction="sum"), (x, y), layer="output", method="exact"
    )
    torch.testing.assert_close(known, unknown, rtol=1e-9, atol=1e-12)


def test_a_common_row_of_the_weight_costs_no_digits() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    x, y = torch.randn(32, 6), torch.randint(4, (32,))
    before = relative_flatness(net, CE(), (x, y), layer="output").value
    with torch.no_grad():
        net.weight += 100
    assert relative_flatness(net, CE(), (x, y), layer="output").value == pytest.approx(before, rel=2e-4)


def test_outputs_that_are_copies_on_some_batches_only() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            z = self.fc(x)
            return z if len(x) == 3 else z * 1.0

    net, (x, y) = Sometimes().double(), data(8)
    cut = list(zip(x.split([3, 5]), y.split([3, 5]), strict=True))
    want = relative_flatness(net.fc, CE(), (x, y), layer="output").value
    assert relative_flatness(net, CE(), cut, layer="fc").value == pytest.approx(want, rel=1e-9)


def test_inference_mode_is_refused() -> None:
    net, (x, y) = mlp(), data()
    with torch.inference_mode(), pytest.raises(GraphError, match="inference_mode"):
        relative_flatness(net, CE(), (x, y), layer="output")


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_ignored_targets_have_no_part_in_confidence(cut: int) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4).double() * 3, torch.tensor([0, -100, 2, -100, -100, 1])
    flat = relative_flatness(
        net, nn.CrossEntropyLoss(), list(zip(x.split(cut), y.split(cut), strict=True)), layer="output"
    )
    top = net(x).softmax(-1).amax(-1)
    assert flat.confidence == pytest.approx(float(top[y != -100].detach().mean()), rel=1e-12)
    assert flat.confidence != pytest.approx(float(top.detach().mean()), rel=1e-3)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_a_sum_divided_by_what_is_one_in_each_batch_is_not_taken_for_a_sum(layer: str) -> None:
    """Over one batch with a positive in it and over all of them the divisor is another."""
    net, (x, _) = mlp(), data(5)
    y = torch.tensor([0, 1, 2, 0, 0])
    loss = lambda z, t: F.cross_entropy(z, t, reduction="sum") / (t > 0).sum()
    with pytest.raises(LossError, match="neither the mean nor the sum"):
        relative_flatness(net, loss, list(zip(x.split([2, 3]), y.split([2, 3]), strict=True)), layer=layer)
