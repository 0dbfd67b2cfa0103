"""How the reference is called, and identities between its functions."""

import pytest
import torch
from torch import nn

from relflat import reference
from relflat.errors import DataError, LayerError


def tanh_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 2, dtype=dtype), torch.tensor([0, 1, 1, 0])


def test_a_module_and_its_weight_mean_the_same() -> None:
    net, (x, y) = tanh_net(), data()
    by_module = reference.kappa(*reference.at_layer(net, nn.CrossEntropyLoss(), x, y, "2"))
    by_parameter = reference.kappa(*reference.at_layer(net, nn.CrossEntropyLoss(), x, y, "2.weight"))
    assert by_module == by_parameter


def test_an_unknown_layer_lists_the_parameters() -> None:
    with pytest.raises(LayerError, match=r"no parameter 'fc'.*0\.weight, 0\.bias, 2\.weight"):
        reference.at_layer(tanh_net(), nn.CrossEntropyLoss(), *data(), "fc")


def test_a_tied_weight_counts_at_all_its_places_under_each_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
            self.last.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).tanh())

    net, (x, y) = Tied().double(), data()
    V = net.first.weight.detach()

    def by_hand(W: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(x @ W.T + net.first.bias)
        return nn.CrossEntropyLoss()(hidden @ W.T + net.last.bias, y)

    expected = reference.kappa(by_hand, V).item()
    for name in ("first", "last"):
        found = reference.kappa(*reference.at_layer(net, nn.CrossEntropyLoss(), x, y, name))
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_float32_models_are_computed_in_float64_and_get_float32_gradients() -> None:
    net, (x, y) = tanh_net(torch.float32), data(torch.float32)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 0.7]))
    kappa = reference.kappa(*reference.at_layer(net, loss_fn, x, y, "2"))
    kappa.backward()
    double = reference.kappa(*reference.at_layer(net.double(), loss_fn, x, y, "2"))
    assert kappa.dtype == torch.float64
    assert kappa.item() == pytest.approx(double.item(), rel=1e-14)
    assert net[0].weight.grad is not None


def test_the_model_is_left_alone() -> None:
    net, (x, y) = tanh_net(), data()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    reference.kappa(*reference.at_layer(net, nn.CrossEntropyLoss(), x, y, "0"))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_batch_norm_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()
    x, y = data()
    net(x)
    net.eval()
    assert reference.kappa(*reference.at_layer(net, nn.CrossEntropyLoss(), x, y, "0")).isfinite()


@pytest.mark.parametrize("shape", [(4, 2), (2, 3, 2)])
def test_kappa_seen_from_the_layers_outputs(shape: tuple[int, ...]) -> None:
    """The layer's output space gives the same value, also for several positions a sample (I5)."""
    net = tanh_net()
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randn(*shape[:-1], 2, dtype=torch.float64)
    first, rest = net[0], net[1:]
    z = first(x)
    H_z = torch.func.hessian(lambda z: nn.MSELoss()(rest(z), y))(z).reshape(z.numel(), z.numel())
    expected = reference.kappa(*reference.at_layer(net, nn.MSELoss(), x, y, "0"))
    assert reference.kappa_in_output_space(first.weight, x, H_z).item() == pytest.approx(expected.item())


def test_kappa_is_the_laplacian_over_feature_matrices() -> None:
    """I4, and the adaptive form is its diagonal part."""
    loss, W = reference.at_layer(tanh_net(), nn.CrossEntropyLoss(), *data(), "2")
    m = W.shape[1]
    H = torch.func.hessian(lambda R: loss(W + W @ R))(torch.zeros(m, m, dtype=torch.float64))
    laplacian = torch.trace(H.reshape(m * m, m * m))
    diagonal = sum(H[t, t, t, t] for t in range(m))
    assert reference.kappa(loss, W).item() == pytest.approx(laplacian.item())
    assert reference.kappa_adaptive(loss, W).item() == pytest.approx(diagonal.item())


def test_gauss_newton_is_the_hessian_for_an_output_layer_and_differs_behind_tanh() -> None:
    net, (x, y) = tanh_net(), data()
    kappas = {}
    for layer in ("0", "2"):
        loss, W = reference.at_layer(net, nn.CrossEntropyLoss(), x, y, layer)
        outputs, _ = reference.outputs_at_layer(net, x, layer)
        ggn = reference.kappa_ggn(outputs, lambda z: nn.CrossEntropyLoss()(z, y), W)
        kappas[layer] = (reference.kappa(loss, W).item(), ggn.item())
    assert kappas["2"][0] == pytest.approx(kappas["2"][1], rel=1e-12)
    assert kappas["0"][0] != pytest.approx(kappas["0"][1], rel=1e-3)
    assert kappas["0"][1] > 0


def test_layerwise_bounds_kappa_for_a_convex_tail() -> None:
    loss, W = reference.at_layer(tanh_net(), nn.CrossEntropyLoss(), *data(), "2")
    spectral = torch.linalg.matrix_norm(W, 2) ** 2 * reference.trace(loss, W)
    assert reference.kappa(loss, W) <= spectral <= reference.layerwise(loss, W)


def test_features_that_never_vary_are_left_out() -> None:
    """kappa_normalized is that of the layer without them: a dead one, and a constant taken over by the bias."""
    layer, (phi, y) = nn.Linear(4, 2).double(), (torch.randn(5, 4, dtype=torch.float64), data()[1])
    y = torch.cat([y, y[:1]])
    phi[:, 1], phi[:, 3] = 0.0, 0.7
    loss, W = reference.at_layer(layer, nn.CrossEntropyLoss(), phi, y, "weight")
    smaller = nn.Linear(2, 2).double()
    with torch.no_grad():
        smaller.weight.copy_(layer.weight[:, [0, 2]])
        smaller.bias.copy_(layer.bias + 0.7 * layer.weight[:, 3])
    less, V = reference.at_layer(smaller, nn.CrossEntropyLoss(), phi[:, [0, 2]], y, "weight")
    std = phi.std(0, correction=0)
    std[3] = 0.0  # rounding
    found = reference.kappa_normalized(loss, W, std)
    assert found.item() == pytest.approx(reference.kappa_normalized(less, V, std[[0, 2]]).item(), rel=1e-12)
    # the limit of small deviations, where the feature is dead
    dead = torch.where(std > 0, std, 1e-9)
    dead[3] = 0.0
    assert found.item() == pytest.approx(reference.kappa_normalized(loss, W, dead).item(), rel=1e-12)
    assert reference.kappa_normalized(loss, W, 0 * std).item() == 0


def test_empty_feature_matrices_and_bad_deviations_are_refused() -> None:
    W = torch.ones(1, 2)
    with pytest.raises(DataError, match="matrices is empty"):
        reference.feature_robustness(lambda W: W.sum(), W, [], 0.1)
    for bad in (-1.0, float("nan")):
        with pytest.raises(DataError, match="no standard deviation"):
            reference.kappa_normalized(lambda W: W.sum(), W, torch.tensor([1.0, bad]))
