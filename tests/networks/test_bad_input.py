"""What cannot work says so: the thing, its value and the remedy; and the model is as it was."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import Dense
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from relflat import ConfigError, GraphError, LayerError, LossError, RelflatError, relative_flatness
from unbounded import FAM

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore:kappa of layer")


class Net(nn.Module):
    """Some parts and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


def state(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    return [hooks, [id(t) for t in tensors], [t.grad for t in tensors], torch.get_rng_state().tolist()]


def refused(model: nn.Module, match: str, error: type[RelflatError], action: Callable[[], Any]) -> None:
    """The action raises one clear error, and the model is as it was."""
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        action()
    message = str(caught.value)
    del caught
    assert state(model) == before, message


def measure(model: nn.Module, layer: Any, data: Any = None, loss: Any = CE, **options: Any) -> Callable[[], Any]:
    return lambda: relative_flatness(model, loss, batch() if data is None else data, layer=layer, **options)


def train(model: nn.Module, layer: Any, data: Any = None, loss: Any = CE, **options: Any) -> Callable[[], Any]:
    x, y = batch() if data is None else data

    def step() -> None:
        with FAM(loss, model, layer, strength=1.0, seed=0, **options) as fam:
            fam(model(x), y)

    return step


# -- numbers -------------------------------------------------------------------------------------------------


def test_no_probes() -> None:
    model = mlp()
    refused(model, "probes=0: at least one", ConfigError, train(model, "0", probes=0))
    refused(model, "probes=0: at least one", ConfigError, measure(model, "0", probes=0))


@pytest.mark.parametrize("rtol", [0.0, -1.0, float("nan")])
def test_rtol_that_is_no_tolerance(rtol: float) -> None:
    model = mlp()
    refused(model, f"rtol={rtol}: a positive number", ConfigError, measure(model, "0", rtol=rtol))


def test_rtol_out_of_reach() -> None:
    model = mlp()
    action = measure(model, "0", batch(2), method="probe", rtol=1e-9, probes=512)
    refused(
        model,
        r"rtol=1e-09 is out of reach: after \d+ probes kappa\(0\) = .*method='xtrace' or 'exact'",
        ConfigError,
        action,
    )


# -- weights that cannot be differentiated -------------------------------------------------------------------


def test_quantised_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    for layer in ("0", model[0]):
        refused(model, r"layer '0' is quantised.*before", LayerError, measure(model, layer))


class Int8Linear(nn.Module):
    """Weights as integers with a scale, as quantisation libraries keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (5, 4), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() / 8).T


@pytest.mark.parametrize("layer", ["0", "0.weight"])
def test_integer_weights(layer: str) -> None:
    model = nn.Sequential(Int8Linear(), nn.Tanh(), nn.Linear(5, 3))
    for action in (train(model, layer), measure(model, layer)):
        refused(model, r"'0.*torch.int8.*real numbers.*before it is quantised", LayerError, action)


@pytest.mark.parametrize("layer", ["0", "0.weight"])
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_weights(sparse: Callable[[Tensor], Tensor], layer: str) -> None:
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0].weight = nn.Parameter(sparse(model[0].weight.detach()))
    for action in (train(model, layer), measure(model, layer)):
        refused(model, r"'0.*torch.sparse_.*to_dense", LayerError, action)


@pytest.mark.parametrize("layer", ["0", "0.weight", "output"])
def test_meta_tensors(layer: str) -> None:
    model = mlp().to("meta")
    for action in (train(model, layer), measure(model, layer)):
        refused(model, r"meta device.*to_empty", LayerError, action)


@pytest.mark.parametrize("layer", ["0", "0.weight"])
def test_complex_weights(layer: str) -> None:
    first = nn.Linear(4, 5, dtype=torch.complex64)
    model = Net(lambda m, x: m.head(m.get_submodule("0")(x.to(torch.complex64)).abs()), head=nn.Linear(5, 3))
    model.add_module("0", first)
    for action in (train(model, layer), measure(model, layer)):
        refused(model, r"'0.*torch.complex64.*real", LayerError, action)


def test_sparse_gradients() -> None:
    net = Net(lambda m, x: m.head(m.embed(x).tanh()), embed=nn.Embedding(4, 2, sparse=True), head=nn.Linear(2, 3))
    data = torch.tensor([0, 1, 3, 3]), torch.tensor([0, 1, 2, 0])
    action = measure(net, "embed.weight", data, method="exact")
    refused(net, r"'embed.weight' is sparse.*name the module", GraphError, action)


# -- radius and normalised features --------------------------------------------------------------------------


def test_radius_on_integer_inputs() -> None:
    net = Net(lambda m, x: m.head(m.embed(x).tanh()), embed=nn.Embedding(4, 2), head=nn.Linear(2, 3))
    data = torch.tensor([0, 1, 3, 3]), torch.tensor([0, 1, 2, 0])
    refused(net, r"Embedding.*torch.int64.*name the next layer", ConfigError, train(net, "embed", data, radius=0.1))


def test_radius_on_a_parameter() -> None:
    model = mlp()
    refused(
        model, "radius=.*'0.weight' is a parameter; name a layer", ConfigError, train(model, "0.weight", radius=0.1)
    )


@pytest.mark.parametrize("options", [{}, {"method": "finite_difference", "curvature": "hessian"}])
def test_normalised_features_of_a_parameter(options: dict[str, Any]) -> None:
    model = mlp()
    for act in (train, measure):
        action = act(model, "0.weight", normalize_features=True, **options)
        refused(model, "normalize_features.*'0.weight' is a parameter; name a layer", ConfigError, action)


def test_radius_under_checkpointing() -> None:
    model = Net(lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)), body=mlp(), head=nn.Linear(3, 3))
    x, y = batch()
    for strength in (0.5, 1.0):
        with FAM(CE, model, "body.0", strength=strength, radius=0.1) as fam:
            loss = fam(model(x), y)
            with pytest.raises(GraphError, match=r"checkpointing recomputes layer 'body.0'.*leave that layer out"):
                loss.backward()
        model.zero_grad()


def test_radius_moves_a_layer_called_by_keyword() -> None:
    model = Net(lambda m, x: m.head(m.fc(input=x).tanh()), fc=nn.Linear(4, 5), head=nn.Linear(5, 3))
    x, y = batch()
    with FAM(CE, model, "fc", strength=0.5, radius=1.0, seed=0) as fam:
        fam(model(x), y)
    assert fam.last["kappa"] != 0


# -- second derivatives --------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """An operation of the user's own with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


def attention(m: Any, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        z = m.fc(x).reshape(x.shape[0], 1, 1, -1).expand(-1, -1, 3, -1)
        return m.head(F.scaled_dot_product_attention(z, z, z).flatten(1))


ONCE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "function of one's own": (
        lambda: Net(lambda m, x: m.head(Once.apply(m.fc(x))), fc=nn.Linear(4, 5), head=nn.Linear(5, 3)),
        "once_differentiable.*finite_difference",
    ),
    "function of one's own beside a residual": (
        lambda: Net(
            lambda m, x: m.head(m.fc(x).tanh() + Once.apply(m.fc(x))), fc=nn.Linear(4, 5), head=nn.Linear(5, 3)
        ),
        "once_differentiable.*finite_difference",
    ),
    "flash attention": (
        lambda: Net(attention, fc=nn.Linear(4, 5), head=nn.Linear(15, 3)),
        "flash_attention.*SDPBackend.MATH",
    ),
}


@pytest.mark.parametrize("method", ["exact", "probe"])
@pytest.mark.parametrize("name", ONCE)
def test_operations_without_second_derivative(name: str, method: str) -> None:
    build, match = ONCE[name]
    model = build()
    for act in (train, measure):
        refused(model, match, GraphError, act(model, "fc", curvature="hessian", method=method))
    flat = measure(model, "fc", method="finite_difference", probes=4)()
    assert flat.method == "finite_difference(hessian, 4)"


def test_embedding_bag() -> None:
    """PyTorch's gradient of it has no derivative; the same function as a product with means of one-hot words has."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.bag(x).tanh())

    net = Net(run, bag=nn.EmbeddingBag(4, 2), head=nn.Linear(2, 3)).double()
    x, y = torch.tensor([[0, 3], [1, 1], [2, 0]]), torch.tensor([0, 2, 1])
    table = nn.Linear(4, 2, bias=False).double()
    table.weight.data = net.bag.weight.detach().mT.clone()
    twin = Net(lambda m, x: m.head(m.table(F.one_hot(x, 4).double().mean(1)).tanh()), table=table, head=net.head)
    want = float(Dense(twin, "table", lambda m: m(x)).kappa(lambda z: CE(z, y)).detach())
    assert relative_flatness(net, CE, (x, y), layer="bag.weight", method="exact").value == pytest.approx(
        want, rel=1e-8
    )
    flat = relative_flatness(net, CE, (x, y), layer="bag.weight", method="finite_difference", probes=400)
    assert abs(flat.value - want) <= 4 * flat.stderr


# -- coupled samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"curvature": "hessian"}, {}], ids=["hessian", "ggn"])
def test_shares_of_samples_that_batch_norm_couples(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    action = train(model, "0", loss=nn.CrossEntropyLoss(reduction="none"), **options)
    refused(model, r"shape \(6,\) and kappa of layer '0' has 1 shares \(samples coupled", LossError, action)


# -- nothing half-done ---------------------------------------------------------------------------------------


def test_a_frozen_parameter() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    action = train(model, "0.weight", curvature="hessian")
    refused(model, r"'0.weight'.*frozen \(requires_grad=False\); unfreeze", LayerError, action)


def test_a_criterion_in_the_place_of_the_model() -> None:
    with pytest.raises(LayerError, match="a criterion: are the two swapped"):
        FAM(nn.Linear(2, 2), nn.CrossEntropyLoss(), "output", strength=0.1)
    with pytest.raises(LayerError, match="a criterion: are the two swapped"):
        relative_flatness(nn.CrossEntropyLoss(), nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)), layer="output")


def test_an_rtol_far_out_of_reach_is_refused_after_the_first_probes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 90), nn.Tanh(), nn.Linear(90, 3))
    batches = 0

    def forward(model: nn.Module, batch: object) -> object:
        nonlocal batches
        batches += 1
        return model(x), y

    x, y = torch.randn(8, 20), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    said = r"rtol=1e-05 is out of reach: after 16 probes .*takes about [\d.]+e\+\d+ probes"
    with pytest.raises(ConfigError, match=said):
        relative_flatness(model, nn.CrossEntropyLoss(), [(x, y)], layer="0", rtol=1e-5, forward=forward)
    assert batches <= 3
