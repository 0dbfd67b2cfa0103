"""Each reparameterisation leaves the function as it is, and refuses where it would not."""

import copy

import pytest
import torch
from torch import nn

from relflat import reparam
from relflat.errors import ConfigError, DataError, GraphError, LayerError, LossError


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def dense_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.LeakyReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18, 4),
    ).double()


def dense_data() -> torch.Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


def image_data() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, dtype=torch.float64)


def test_rescale_layer_divides_features_and_multiplies_the_weight() -> None:
    net, x = dense_net(), dense_data()
    before, phi, W, b = net(x), net[:2](x), net[2].weight.clone(), net[2].bias.clone()
    reparam.rescale_layer(net[0], net[1], net[2], factor=10.0)
    assert same(net(x), before)
    assert same(net[:2](x), phi / 10)
    assert same(net[2].weight, W * 10)
    assert same(net[2].bias, b)


def test_rescale_neurons_multiplies_rows_and_divides_columns() -> None:
    net, x = dense_net(), dense_data()
    factors = torch.tensor([0.1, 1.0, 2.0, 30.0], dtype=torch.float64)
    before, phi = net(x), net[:2](x)
    reparam.rescale_neurons(net[0], net[1], net[2], factors)
    assert same(net(x), before)
    assert same(net[:2](x), phi * factors)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 6)])
def test_channels_through_pooling_and_flattening(first: int, last: int) -> None:
    net, x = conv_net(), image_data()
    before = net(x)
    factors = torch.linspace(0.5, 4.0, net[first].out_channels, dtype=torch.float64)
    reparam.rescale_neurons(net[first], net[first + 1 : last], net[last], factors)
    assert same(net(x), before)


def test_layers_without_bias_and_dropout_between() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Dropout(), nn.PReLU(), nn.Linear(4, 2)).double()
    net.eval()
    x = dense_data()
    before = net(x)
    reparam.rescale_layer(net[0], [net[1], net[2]], net[3], 3.0)
    assert same(net(x), before)


def test_random_rescaling_reaches_all_pairs_and_is_reproducible() -> None:
    net, x = conv_net(), image_data()
    before, twin = net(x), copy.deepcopy(net)
    factors = reparam.random_rescaling(net, generator=torch.Generator().manual_seed(1))
    again = reparam.random_rescaling(twin, generator=torch.Generator().manual_seed(1))
    assert same(net(x), before)
    assert factors == again
    assert len(factors) == 2
    assert all(5 <= factor < 25 for factor in factors)


def test_random_rescaling_skips_what_is_not_homogeneous() -> None:
    tanh = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = dense_data()
    before = tanh(x)
    assert len(reparam.random_rescaling(tanh)) == 1
    assert same(tanh(x), before)
    with pytest.raises(LayerError, match="rescale_layer"):
        reparam.random_rescaling(tanh[:3])
    with pytest.raises(ConfigError, match="low=0"):
        reparam.random_rescaling(tanh, low=0)


def test_shift_rows_moves_logits_but_no_probability() -> None:
    net, x = dense_net(), dense_data()
    before = net(x)
    vector = torch.randn(4, dtype=torch.float64)
    reparam.shift_rows(net[2], vector, nn.CrossEntropyLoss())
    assert not same(net(x), before)
    assert same(net(x).softmax(-1), before.softmax(-1))


@pytest.mark.parametrize("head", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.Sigmoid()])
def test_shift_rows_refuses_heads_that_see_it(head: nn.Module) -> None:
    with pytest.raises(LossError, match="softmax"):
        reparam.shift_rows(nn.Linear(3, 2), torch.ones(3), head)


def test_features_are_rescaled_normalized_and_rotated() -> None:
    layer, phi = nn.Linear(3, 2).double(), dense_data() * torch.tensor([1.0, 10.0, 0.1])
    W = layer.weight.clone()
    before = layer(phi)
    scales = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q

    rescaled = reparam.rescale_features(layer, scales)
    assert same(rescaled(phi), before)
    assert same(rescaled[0](phi), phi / scales)
    assert same(rescaled[-1].weight, W * scales)

    normalized = reparam.normalize_features(layer, phi)
    assert same(normalized(phi), before)
    assert same(normalized[0](phi).std(0, correction=0), torch.ones(3, dtype=torch.float64))

    rotated = reparam.rotate_features(layer, Q)
    assert same(rotated(phi), before)
    assert same(rotated[0](phi), phi @ Q.T)
    assert same(layer.weight, W)


def test_a_feature_that_never_varies_keeps_its_scale() -> None:
    layer, phi = nn.Linear(2, 2).double(), torch.tensor([[3.0, 1.0], [3.0, 5.0]], dtype=torch.float64)
    normalized = reparam.normalize_features(layer, phi)
    assert same(normalized(phi), layer(phi))
    assert normalized[0](phi)[:, 0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "between", [nn.GELU(), nn.Tanh(), nn.Softplus(), nn.BatchNorm1d(4), nn.Sequential(nn.ReLU(), nn.ELU())]
)
def test_what_is_not_homogeneous_is_refused_and_nothing_changes(between: nn.Module) -> None:
    net = dense_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(LayerError, match="not positively homogeneous"):
        reparam.rescale_layer(net[0], between, net[2], 2.0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_pooling_over_dense_neurons_is_refused() -> None:
    with pytest.raises(LayerError, match="MaxPool1d"):
        reparam.rescale_layer(nn.Linear(3, 4), nn.MaxPool1d(2), nn.Linear(2, 2), 2.0)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_factors_are_named(factor: float) -> None:
    net = dense_net()
    with pytest.raises(ConfigError, match=f"factor={factor}"):
        reparam.rescale_layer(net[0], net[1], net[2], factor)
    with pytest.raises(ConfigError, match="factors="):
        reparam.rescale_neurons(net[0], net[1], net[2], torch.tensor([1.0, 1.0, 1.0, factor]))


def test_layers_that_cannot_be_rescaled_are_named() -> None:
    grouped, tied = nn.Conv1d(4, 4, 1, groups=2), nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = tied.weight
    with pytest.raises(LayerError, match="Embedding"):
        reparam.rescale_layer(nn.Embedding(3, 4), nn.ReLU(), nn.Linear(4, 2), 2.0)
    with pytest.raises(LayerError, match="reads 5"):
        reparam.rescale_layer(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2), 2.0)
    with pytest.raises(LayerError, match="groups=2"):
        reparam.rescale_layer(nn.Conv1d(1, 4, 1), nn.ReLU(), grouped, 2.0)
    with pytest.raises(LayerError, match="share one weight"):
        reparam.rescale_layer(tied, nn.ReLU(), twin, 2.0)
    with pytest.raises(LayerError, match="not a Linear"):
        reparam.rotate_features(grouped, torch.eye(4))


def test_bad_vectors_and_data_are_named() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=r"factors has shape \(2,\).*4 entries"):
        reparam.rescale_neurons(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), torch.ones(2))
    with pytest.raises(ConfigError, match="3 entries"):
        reparam.shift_rows(layer, torch.ones(2), nn.CrossEntropyLoss())
    with pytest.raises(ConfigError, match="orthogonal"):
        reparam.rotate_features(layer, torch.ones(3, 3))
    with pytest.raises(DataError, match="1 sample"):
        reparam.normalize_features(layer, torch.ones(1, 3))


def test_preserving_puts_the_weights_back_when_the_declaration_was_wrong() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double(), dense_data()
    before = net(x)
    with pytest.raises(GraphError, match="no reparameterisation"), reparam.preserving(net, x):
        reparam.rescale_layer(net[0], nn.ReLU(), net[2], 2.0)
    assert same(net(x), before)


def test_preserving_may_compare_a_part_of_the_outputs() -> None:
    net, x = dense_net(), dense_data()
    with reparam.preserving(net, x, output=lambda z: z.softmax(-1)):
        reparam.shift_rows(net[2], torch.ones(4, dtype=torch.float64), nn.CrossEntropyLoss())
