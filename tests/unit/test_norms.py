"""Normalisations differentiated by hand: against differences, PyTorch's own, and where it steps aside."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from relflat import relative_flatness
from relflat.curvature import torch_norms as norms
from relflat.curvature.torch_norms import norms_mended
from unbounded import FAM

SHAPES = {1: (6, 3), 2: (5, 3, 4), 3: (4, 3, 3, 2), 4: (3, 3, 2, 2, 2)}
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


def norm(dims: int, *, affine: bool = True, training: bool = True, running: bool = True) -> nn.Module:
    torch.manual_seed(dims)
    bn = KINDS[dims](3, affine=affine, track_running_stats=running).double().train(training)
    if running:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return bn


def input_gradient(bn: nn.Module, x: Tensor, weight: Tensor | None, gy: Tensor, *, cheap: bool) -> Tensor:
    """The gradient in the input of ``<gy, bn(x)>``, differentiable again."""
    given = {} if weight is None else {"weight": weight}
    frozen = {n: b.clone() for n, b in bn.named_buffers()}
    y = torch.func.functional_call(bn, given | frozen, (x * 1,))
    if not cheap:
        return torch.autograd.grad(y, x, gy, create_graph=True)[0]
    with norms_mended([y], [x]):
        return torch.autograd.grad(y, x, gy, create_graph=True)[0]


def problem(dims: int, affine: bool) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    x, gy = (torch.randn(SHAPES[dims], generator=g, dtype=torch.float64) for _ in range(2))
    weight = (torch.randn(3, generator=g, dtype=torch.float64),) if affine else ()
    return tuple(t.requires_grad_() for t in (x + 1, gy, *weight))


def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records each backward that was done by hand: whether with statistics of the batch."""
    seen: list[bool] = []
    original = norms._BatchNorm.once

    def spy(self: norms._BatchNorm, *args: object) -> object:
        seen.append(self.training)
        return original(self, *args)

    monkeypatch.setattr(norms._BatchNorm, "once", spy)
    return seen


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
class TestDerivatives:
    def function(self, dims: int, affine: bool, training: bool) -> Callable[..., Tensor]:
        bn = norm(dims, affine=affine, training=training)
        return lambda x, gy, weight=None: input_gradient(bn, x, weight, gy, cheap=True)

    def test_against_finite_differences(self, dims, affine, training, monkeypatch) -> None:
        seen = used(monkeypatch)
        function, given = self.function(dims, affine, training), problem(dims, affine)
        assert torch.autograd.gradcheck(function, given)
        assert set(seen) == {training}

    def test_third_derivatives(self, dims, affine, training) -> None:
        assert torch.autograd.gradgradcheck(self.function(dims, affine, training), problem(dims, affine))

    def test_equal_to_pytorchs_own(self, dims, affine, training) -> None:
        bn, given = norm(dims, affine=affine, training=training), problem(dims, affine)
        x, gy, *weight = given
        v = torch.randn_like(x)
        ours, theirs = (
            torch.autograd.grad(
                input_gradient(bn, x, *(weight or [None]), gy, cheap=c), given, v, materialize_grads=True
            )
            for c in (True, False)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


class TestPrecision:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("own", ["float32", "half", None])
    def test_half_precision_is_as_good_as_its_inputs(
        self, own: str | None, half: torch.dtype, training: bool, layout: torch.memory_format
    ) -> None:
        weight = {"float32": torch.float32, "half": half, None: None}[own]
        bn = nn.BatchNorm2d(8, affine=weight is not None).train(training)
        bn = bn if weight is None else bn.to(weight)
        x, gy, v = (torch.randn(16, 8, 6, 6).to(half, memory_format=layout).requires_grad_() for _ in range(3))
        given = [x, gy] if weight is None else [x, gy, bn.weight]

        def derivatives(bn: nn.Module, x: Tensor, gy: Tensor, v: Tensor, cheap: bool) -> tuple[Tensor, ...]:
            wanted = [x, gy] if weight is None else [x, gy, bn.weight]
            y = bn(x)
            if cheap:
                with norms_mended([y], [x]):
                    (g,) = torch.autograd.grad(y, x, gy, create_graph=True)
            else:
                (g,) = torch.autograd.grad(y, x, gy, create_graph=True)
            return torch.autograd.grad(g, wanted, v, materialize_grads=True)

        ours = derivatives(bn, x, gy, v, cheap=True)
        exact = derivatives(
            copy.deepcopy(bn).double(), *(t.detach().double().requires_grad_() for t in (x, gy, v)), cheap=False
        )
        for a, b, t in zip(ours, exact, given, strict=True):
            assert a.dtype == t.dtype
            assert float((a.double() - b).norm()) <= 8e-3 * float(b.norm())  # bfloat16 has 8 bits

    def test_float32_against_float64(self) -> None:
        torch.manual_seed(0)
        bn = nn.BatchNorm2d(8)
        x, gy, v = (torch.randn(16, 8, 6, 6) + shift for shift in (30, 5, 5))  # far from centred
        errors = []
        for dtype in (torch.float32, torch.float64):
            xs, gs, vs = (t.to(dtype).requires_grad_() for t in (x, gy, v))
            y = copy.deepcopy(bn).to(dtype)(xs)
            with norms_mended([y], [xs]):
                (g,) = torch.autograd.grad(y, xs, gs, create_graph=True)
            errors.append(torch.autograd.grad(g, [xs, gs], vs))
        for a, b in zip(*errors, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < 1e-4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()


def images() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(3, (6,), generator=g)


def gradients(net: nn.Module, call: Callable[[Tensor], Tensor] | None = None, **options: object) -> list[Tensor]:
    x, y = images()
    fam = FAM(nn.CrossEntropyLoss(), net, ["0", "3"], strength=0.5, seed=0, **options)
    loss = fam(net(x), y)
    found = torch.autograd.grad(loss, list(net.parameters()))
    fam.close()
    return [*found, loss.detach()]


@pytest.mark.parametrize(
    "options", [{}, {"curvature": "hessian", "gradient": "frozen"}, {"gradient": "frozen"}], ids=str
)
def test_fam_through_batch_norm_is_the_same_number(options, monkeypatch) -> None:
    ours = gradients(network(), **options)
    monkeypatch.setattr(norms, "_MENDED", {})
    for a, b in zip(ours, gradients(network(), **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "instance", "layer"])
@pytest.mark.parametrize("options", [{"curvature": "hessian"}, {"method": "exact"}], ids=str)
def test_third_derivatives_of_fam_against_differences(options, norm) -> None:
    """PyTorch's own are wrong here: the gradient of kappa goes through three derivatives of the normalisation."""
    torch.manual_seed(0)
    between = {
        "batch": [nn.BatchNorm1d(3, track_running_stats=False)],
        "instance": [nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten()],
        "layer": [nn.LayerNorm(3)],
    }
    net = nn.Sequential(nn.Linear(4, 3), *between[norm], nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))

    def penalty() -> Tensor:
        with FAM(nn.CrossEntropyLoss(), net, "0", strength=1.0, seed=3, **options) as fam:
            out = net(x)
            return fam(out, y) - nn.functional.cross_entropy(out, y)

    weight = net[0].weight
    (found,) = torch.autograd.grad(penalty(), weight)
    along, h = torch.randn_like(weight), 1e-5
    ends = []
    for k in (1, -1):
        with torch.no_grad():
            weight.add_(k * h * along)
        ends.append(float(penalty().detach()))
        with torch.no_grad():
            weight.sub_(k * h * along)
    assert float((found * along).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def record(monkeypatch: pytest.MonkeyPatch, hooked: list[object]) -> None:
    """Notes the nodes that are hooked."""
    original = norms._hook

    def spy(node: object, norms_of: tuple[type[object], ...], *rest: object) -> object:
        if norms._BatchNorm in norms_of:
            hooked.append(node)
        return original(node, norms_of, *rest)

    monkeypatch.setattr(norms, "_hook", spy)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_layer_norm_second_and_third_derivatives(affine: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bias = torch.randn(shape).double() if affine else None
    given = [torch.randn(3, *shape).double().requires_grad_() for _ in range(2)]
    given += [torch.randn(shape).double().requires_grad_()] * affine

    def gradient(x: Tensor, gy: Tensor, weight: Tensor | None = None) -> Tensor:
        y = nn.functional.layer_norm(x * 1, shape, weight, bias, eps=0.3)
        with norms_mended([y], [x]):
            return torch.autograd.grad(y, x, gy, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, given)
    assert torch.autograd.gradgradcheck(gradient, given)


def test_it_is_used_by_fam_and_leaves_no_hooks(monkeypatch) -> None:
    seen, net = used(monkeypatch), network()
    (x, y), handles = images(), []
    record(monkeypatch, handles)
    fam = FAM(nn.CrossEntropyLoss(), net, ["0", "3"], strength=0.5)
    fam(net(x), y)  # the first step looks at the gradient of each kappa
    seen.clear()
    handles.clear()
    loss = fam(net(x), y)
    torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert seen == [True, True]
    assert len(handles) == 2
    (again,) = torch.autograd.grad(loss, net[0].weight, create_graph=True, retain_graph=True)
    assert seen == [True, True]  # the graph of the loss has no hooks
    assert again.requires_grad


def test_nodes_before_the_layer_are_left_alone(monkeypatch) -> None:
    hooked: list[object] = []
    record(monkeypatch, hooked)
    net, (x, y) = network(), images()
    FAM(nn.CrossEntropyLoss(), net, "3", strength=0.5)(net(x), y)
    assert len(hooked) == 1


def test_a_checkpointed_part_falls_back(monkeypatch) -> None:
    """Checkpointing hands out a saved tensor once, and the node itself has had it."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            first = self.net[0](x)
            return self.net[3:](checkpoint(self.net[1:3], first, use_reentrant=False))

    x, y = images()
    found = []
    for net in (Checkpointed(), Checkpointed()):
        if found:
            monkeypatch.setattr(norms, "_MENDED", {})
        fam = FAM(nn.CrossEntropyLoss(), net, "net.0", strength=0.5, seed=0)
        found.append(torch.autograd.grad(fam(net(x), y), list(net.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@functorch_config.patch(donated_buffer=False)  # two backward passes: as the error says
def test_a_compiled_part_falls_back() -> None:
    torch._dynamo.reset()  # whatever other tests compiled
    x, y = images()
    found = []
    for compiled in (False, True):
        net = network()
        if compiled:
            tail = torch.compile(net[4:6], backend="aot_eager")
            net[4], net[5] = tail, nn.Identity()
        fam = FAM(nn.CrossEntropyLoss(), net, ["3"], strength=0.5, seed=0, gradient="frozen")
        found.append(torch.autograd.grad(fam(net(x), y), list(net.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_measuring_with_running_statistics() -> None:
    """Evaluation mode: the Hessian's products pass through the nodes too."""
    net, data = network(), images()
    values = [
        relative_flatness(net, nn.CrossEntropyLoss(), data, layer="3", method=m, probes=400)
        for m in ("exact", "probe")
    ]
    assert abs(values[0].value - values[1].value) < 4 * values[1].stderr


class CuDNN:
    """Stands in for the node of cuDNN, where there is no GPU: what it saves, by the names it has there."""

    def __init__(self, node: object) -> None:
        self._saved_epsilon = node._saved_eps
        for name in ("input", "weight", "training", "running_mean", "running_var", "result1", "result2"):
            setattr(self, f"_saved_{name}", getattr(node, f"_saved_{name}"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_the_node_of_cudnn_by_a_stand_in_against_elementary_operations(running, training, layout) -> None:
    """No GPU is needed: the rule reads the node and calls PyTorch's own kernel, wherever that runs."""
    if not (running or training):
        training = True
    bn, (x, gy, weight) = norm(3, training=training, running=running), problem(3, True)
    x = x.detach().to(memory_format=layout).requires_grad_()
    with torch.no_grad():
        bn.weight.copy_(weight)
    node = bn(x).grad_fn
    real = node.name() == "CudnnBatchNormBackward0"
    rule = norms._MENDED["CudnnBatchNormBackward0"][0](node if real else CuDNN(node))
    over, shape = [0, 2, 3], (1, 3, 1, 1)
    mean, var = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
    if not training:
        mean, var = bn.running_mean.view(shape), bn.running_var.view(shape)
    y = (x - mean) / (var + bn.eps).sqrt() * weight.view(shape)
    (want,) = torch.autograd.grad(y, x, gy, create_graph=True)
    given, v = (gy, x, weight), torch.randn_like(x)
    second = torch.autograd.grad(want, given, v, create_graph=True, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(rule.composed(*given), want)
    once = rule.once(v, want.detach(), given, [True] * 3)
    third = lambda g: torch.autograd.grad(g, given, v, allow_unused=True, materialize_grads=True, retain_graph=True)
    composed = rule.composed(*given)
    ours = torch.autograd.grad(composed, given, v, create_graph=True, allow_unused=True, materialize_grads=True)
    for mine, other in zip(once, second, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if mine is None else mine, other)
    if second[1].requires_grad:
        for mine, other in zip(third(ours[1]) if ours[1].requires_grad else (), third(second[1]), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["Cudnn", "Miopen", "Native"])
def test_batch_norm_of_every_kernel_is_replaced(name: str) -> None:
    assert norms._MENDED[f"{name}BatchNormBackward0"] == (norms._BatchNorm,)
