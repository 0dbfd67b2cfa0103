"""Losses in other forms: each has the kappa of the loss that it is, by criterion and ``penalty(loss)`` alike."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import data, mlp
from torch import Tensor, nn

from relflat import GraphError, LossError, RelflatError, RelflatWarning, relative_flatness
from relflat.curvature.slope import must_be_asked
from relflat.curvature.torch_norms import norms_mended
from relflat.rng import Rng
from unbounded import FAM

CE = nn.CrossEntropyLoss


class Doubled(CE):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return 2 * super().forward(z, y)


def hooked() -> nn.Module:
    loss = CE()
    loss.register_forward_hook(lambda module, args, found: 2 * found)
    return loss


def patched() -> nn.Module:
    loss = CE()
    loss.forward = lambda z, y: 2 * F.cross_entropy(z, y)
    return loss


def label_smoothing(z: Tensor, y: Tensor) -> Tensor:
    """As timm has it."""
    log_p = F.log_softmax(z, dim=-1)
    nll = -log_p.gather(dim=-1, index=y.unsqueeze(1)).squeeze(1)
    return (0.9 * nll + 0.1 * -log_p.mean(dim=-1)).mean()


def soft_targets(z: Tensor, y: Tensor) -> Tensor:
    """As timm has it."""
    target = F.one_hot(y, z.shape[-1]) * 0.7 + 0.1
    return torch.sum(-target * F.log_softmax(z, dim=-1), dim=-1).mean()


def soft(y: Tensor) -> Tensor:
    return (F.one_hot(y, 3) * 0.7 + 0.1).double()


compiled = functools.partial(torch.compile, backend="aot_eager")

# the loss, the same in a plain form, and whether it is a loss of log-probabilities
SAME: dict[str, tuple[Callable[[], Callable[..., Tensor]], Callable[..., Tensor], bool]] = {
    "in a function": (lambda: lambda z, y: F.cross_entropy(z.reshape(-1, 3), y.reshape(-1)), CE(), False),
    "own class": (Doubled, lambda z, y: 2 * F.cross_entropy(z, y), False),
    "hooked": (hooked, lambda z, y: 2 * F.cross_entropy(z, y), False),
    "patched": (patched, lambda z, y: 2 * F.cross_entropy(z, y), False),
    "partial": (lambda: functools.partial(F.cross_entropy, label_smoothing=0.1), CE(label_smoothing=0.1), False),
    "nll of log-probabilities": (nn.NLLLoss, CE(), True),
    "nll within": (lambda: lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), CE(), False),
    "label smoothing": (lambda: label_smoothing, CE(label_smoothing=0.1), False),
    "soft targets": (lambda: soft_targets, lambda z, y: F.cross_entropy(z, soft(y)), False),
    "kl": (lambda: lambda z, y: F.kl_div(z.log_softmax(1), soft(y), reduction="batchmean"), soft_targets, False),
    "compiled": (lambda: compiled(CE()), CE(), False),
    "compiled function": (lambda: compiled(F.cross_entropy), CE(), False),
}


def models(log_softmax: bool) -> tuple[nn.Module, nn.Module]:
    plain, same = mlp(), mlp()
    return plain, nn.Sequential(*same, nn.LogSoftmax(-1)) if log_softmax else same


def added(fam: FAM, model: nn.Module, loss: Callable[..., Tensor], how: str) -> list[Tensor]:
    """The penalty and its gradients."""
    x, y = data()
    z = model(x)
    penalty = fam(z, y) - loss(z, y).detach() if how == "criterion" else fam.penalty(loss(z, y))
    found = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True, materialize_grads=True)
    if how == "criterion":
        task = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        found = tuple(a - b for a, b in zip(found, task, strict=True))
    return [penalty.detach(), *found]


@pytest.mark.parametrize("how", ["criterion", "penalty"])
@pytest.mark.parametrize("name", SAME)
def test_a_loss_in_another_form_has_the_closed_form_of_what_it_is(name: str, how: str) -> None:
    make, same, log_softmax = SAME[name]
    plain, model = models(log_softmax)
    if how == "penalty" and name.startswith("compiled"):
        pytest.skip("penalty(loss) has no function to look into")
    with FAM(make(), model, "output", strength=1.0) as fam:
        got = added(fam, model, fam.loss_fn, how)
        assert fam.last["method"] == "closed_form"
    with FAM(same, plain, "output", strength=1.0, curvature="hessian", method="exact") as fam:
        want = added(fam, plain, same, "criterion")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("options", [{"method": "exact"}, {"curvature": "hessian", "method": "exact"}, {}], ids=str)
@pytest.mark.parametrize("how", ["criterion", "penalty"])
@pytest.mark.parametrize("name", ["in a function", "nll of log-probabilities", "soft targets"])
def test_hidden_layers_get_every_method_by_either_road(name: str, how: str, options: dict[str, Any]) -> None:
    make, same, log_softmax = SAME[name]
    plain, model = models(log_softmax)
    got, want = [], []
    with FAM(make(), model, "0", strength=1.0, seed=0, **options) as fam:
        got = added(fam, model, fam.loss_fn, how)
    reference = same if isinstance(same, CE) or "curvature" in options else functools.partial(same)
    with FAM(reference, plain, "0", strength=1.0, seed=0, **options) as fam:
        want = added(fam, plain, same, "criterion")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layer", ["0", "output"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["nll of log-probabilities", "soft targets", "compiled", "hooked"])
def test_measured(name: str, curvature: str, layer: str) -> None:
    make, same, log_softmax = SAME[name]
    plain, model = models(log_softmax)
    x, y = data()
    batches = list(zip(x.split(3), y.split(3), strict=True))
    got = relative_flatness(model, make(), batches, layer=layer, curvature=curvature, method="exact")
    layer = "2" if layer == "output" and log_softmax and curvature == "hessian" else layer
    want = relative_flatness(plain, same, batches, layer=layer, curvature=curvature, method="exact")
    assert got.value == pytest.approx(want.value, rel=1e-8)


def test_what_lies_between_the_outputs_and_the_logits_keeps_its_gauss_newton_matrix() -> None:
    """Logits that the loss computes of the outputs are not the outputs."""
    loss, (x, y) = (lambda z, t: F.cross_entropy(z.sin(), t)), data()
    found = []
    for how in ("criterion", "penalty"):
        with FAM(loss, net := mlp(), "output", strength=1.0, method="exact") as fam:
            z = net(x)
            found.append(float(fam(z, y) - loss(z, y) if how == "criterion" else fam.penalty(loss(z, y))))
    want = relative_flatness(mlp(), loss, data(), layer="output", curvature="hessian", method="exact").value
    assert found == pytest.approx([want, want], rel=1e-9)


# -- compiled parts ------------------------------------------------------------------------------------------


class LossInside(nn.Module):
    """As models of Transformers with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.net(x)
        return {"loss": F.cross_entropy(z, y), "logits": z}


@pytest.mark.parametrize(
    ("layer", "options"), [("output", {}), ("net.0", {"curvature": "hessian", "method": "exact"})]
)
@pytest.mark.filterwarnings("ignore:kappa")
def test_a_compiled_model_with_its_loss_inside(layer: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    (x, y), found = data(), []
    for wrap in (lambda m: m, compiled):
        model = LossInside()
        with FAM(CE(), model, layer, strength=1.0, seed=0, **options) as fam:
            called = wrap(model)
            for _ in range(2):
                penalty = fam.penalty(called(x, y)["loss"] / 4)
            found.append(
                [penalty.detach(), *torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)]
            )
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_replay_leaves_buffers_and_random_numbers_alone() -> None:
    torch._dynamo.reset()
    x, y = data()
    tail = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh()).double()
    net = nn.Sequential(nn.Linear(4, 5), compiled(tail), nn.Linear(5, 3)).double()
    with FAM(CE(), net, "0", strength=1.0) as fam:
        with pytest.warns(RelflatWarning, match="without compiled code"):
            fam(net(x), y)
        z = net(x)
        before, state = [b.clone() for b in net.buffers()], torch.get_rng_state()
        fam(z, y)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


# -- derivatives that are somebody's own ---------------------------------------------------------------------


class Fused(torch.autograd.Function):
    """Cross-entropy that makes its gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        p = z.softmax(1)
        ctx.save_for_backward((p - F.one_hot(y, z.shape[1])) / len(z))
        return -p[range(len(z)), y].log().mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0], None


class Partly(torch.autograd.Function):
    """``sum sqrt(1 + z^2)`` whose backward takes the root for a constant: a curvature, and the wrong one."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        root = (1 + z.square()).sqrt()
        ctx.save_for_backward(z, root)
        return root.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, root = ctx.saved_tensors
        return g * z / root


class Single(torch.autograd.Function):
    """A kernel for float32 only."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        assert z.dtype == torch.float32
        return Fused.forward(ctx, z, y)

    backward = Fused.backward


class Right(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.pow(4).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 4 * g * ctx.saved_tensors[0].pow(3)


class Bend(torch.autograd.Function):
    """``sum max(z - 1, 0)^2 / 2 + z^2``: right, with a curvature that jumps by half of itself at 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return ((z - 1).relu().square() / 2 + z.square()).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return g * ((z - 1).relu() + 2 * z)


@pytest.mark.parametrize("short", [0.3, 0.7, 1.3])
def test_a_right_derivative_is_believed_where_differences_reach_over_a_bend(short: float) -> None:
    """The kink lies within the stencil of one step or of both, so that they disagree: autograd has the say."""
    z = torch.full((4, 3), 1 - 1e-3 * short).double().requires_grad_()  # a step of differences is 1e-3
    loss = Bend.apply(z)
    assert not must_be_asked(loss, z, Bend.apply, Rng(0, 0), only_products=False)
    assert must_be_asked(Partly.apply(z), z, Partly.apply, Rng(0, 0), only_products=False)


def ctc(z: Tensor, y: Tensor) -> Tensor:
    """Over one step of time, where it is the cross-entropy of a label."""
    n = torch.ones(len(z), dtype=torch.long)
    return F.ctc_loss(z.log_softmax(1)[None], 1 + y[:, None] % 2, n, n, reduction="sum")


OWN = {
    "fused": (Fused.apply, F.cross_entropy),
    "float32 only": (Single.apply, F.cross_entropy),
    "partly": (lambda z, y: Partly.apply(z), lambda z, y: (1 + z.square()).sqrt().sum()),
    "missing": (ctc, lambda z, y: F.cross_entropy(z, 1 + y % 2, reduction="sum")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layer", ["0", "output"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", OWN)
def test_a_curvature_that_autograd_has_wrong_is_asked_of_the_loss(name: str, curvature: str, layer: str) -> None:
    loss, plain = OWN[name]
    (x, y), dtype = data(), torch.float32 if name == "float32 only" else torch.float64
    options: dict[str, Any] = {"layer": layer, "curvature": curvature, "method": "exact"}
    got = relative_flatness(mlp().to(dtype), loss, (x.to(dtype), y), **options)
    want = relative_flatness(mlp(), plain, (x, y), **options)
    assert got.value == pytest.approx(want.value, rel=2e-4 if dtype == torch.float32 else 1e-8)


def test_a_fused_loss_of_one_of_several_outputs_is_asked_with_the_others_as_they_were() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = mlp(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"z": self.net(x), "other": self.other(x).detach()}

    (x, y), found = data(), []
    for loss in (Fused.apply, F.cross_entropy):
        torch.manual_seed(0)
        criterion = lambda out, y, loss=loss: loss(out["z"] + out["other"], y)
        options = {"layer": "net.0", "curvature": "hessian", "method": "exact"}
        found.append(relative_flatness(Two().to(x), criterion, (x, y), **options).value)
    assert found[0] == pytest.approx(found[1], rel=1e-8)


@pytest.mark.parametrize("name", ["fused", "partly"])
def test_training_needs_the_gradient_of_that_curvature_unless_it_is_frozen(name: str) -> None:
    (loss, plain), (x, y) = OWN[name], data()
    with FAM(loss, net := mlp(), "0", strength=1.0) as fam, pytest.raises(LossError, match="gradient='frozen'"):
        fam(net(x), y)
    grads = []
    for fn in (loss, plain):
        with FAM(fn, net := mlp(), "0", strength=1.0, gradient="frozen", method="exact") as fam:
            fam(net(x), y).backward()
            grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    with FAM(CE(), net := mlp(), "0", strength=1.0) as fam, pytest.raises(LossError, match="may be wrong"):
        fam.penalty(loss(net(x), y))


def test_a_right_one_is_believed_and_a_hinge_has_none() -> None:
    x, y = data()
    with FAM(lambda z, t: Right.apply(z), net := mlp(), "0", strength=1.0, method="exact") as fam:
        fam(net(x), y)
        want = relative_flatness(
            mlp(), lambda z, t: z.pow(4).sum(), (x, y), layer="0", curvature="ggn", method="exact"
        )
        assert fam.last["kappa"] == pytest.approx(want.value, rel=1e-8)
    with pytest.warns(RelflatWarning, match="no curvature"):
        flat = relative_flatness(mlp(), lambda z, t: (z - 3).abs().mean(), (x, y), layer="output")
    assert flat.value == 0


def test_a_hinge_that_is_only_known_by_its_graph_has_none_either() -> None:
    x, y = data()
    with (
        FAM(None, net := mlp(), "0", strength=1.0, curvature="hessian") as fam,
        pytest.warns(RelflatWarning, match="no curvature"),
    ):
        penalty = fam.penalty(F.relu(1 - net(x)[torch.arange(len(y)), y]).mean())
    assert penalty == 0


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}])
def test_a_function_has_the_defaults_of_its_module(options: dict[str, Any]) -> None:
    net, (x, y) = mlp(), data()
    y[:3] = -100
    loss = functools.partial(F.cross_entropy, **options) if options else F.cross_entropy
    found, want = (relative_flatness(net, f, (x, y), layer="output") for f in (loss, CE(**options)))
    exact = relative_flatness(net, lambda z, t: CE(**options)(z, t), (x, y), layer="output", method="exact")
    assert found.method == want.method == "closed_form"
    assert found.value == want.value
    assert found.value == pytest.approx(exact.value, rel=1e-5)
    assert found.confidence == want.confidence


def test_batches_of_a_loss_that_is_read_add_up_by_what_its_mean_divides_by() -> None:
    """Targets that are ignored lie in one batch, so that neither the mean nor the sum of the batches is right."""
    torch.manual_seed(0)
    net, x, y = mlp(), torch.randn(12, 4).double(), torch.randint(3, (12,))
    y[:5] = -100
    loss, live = lambda z, t: F.nll_loss(F.log_softmax(z, dim=-1), t), net[:-1](x[5:])
    found = relative_flatness(net, loss, [(x[:6], y[:6]), (x[6:], y[6:])], layer="2")
    p, w = (live @ net[-1].weight.T + net[-1].bias).softmax(-1), net[-1].weight
    variance = p @ w.square().sum(-1) - (p @ w).square().sum(-1)
    assert found.value == pytest.approx(float((live.square().sum(-1) * variance).mean()), rel=1e-9)
    assert found.confidence == pytest.approx(float(p.amax(-1).mean()))


# -- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [-100, 255, 2])
@pytest.mark.parametrize("classes", [1, 3, 6])
def test_targets_of_a_byte_are_those_of_a_long(classes: int, ignored: int) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(4, classes), torch.randn(6, 4)
    y = torch.randint(classes, (6,))
    y[0] = ignored if ignored > 2 else y[0]
    y[1] = 0
    loss = CE(weight=1 + torch.arange(classes).float(), ignore_index=ignored)
    flats = [relative_flatness(net, loss, (x, t), layer="output") for t in (y, y.to(torch.uint8))]
    exact = relative_flatness(net, loss, (x, y), layer="output", method="exact").value
    assert [f.value for f in flats] == pytest.approx([exact, exact], rel=1e-4, abs=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layer", ["output", "0"])
def test_an_empty_batch_leaves_the_gradients_finite_and_the_next_as_it_is(layer: str, reduction: str) -> None:
    net, (x, y) = mlp(), data()
    with FAM(CE(reduction=reduction), net, layer, strength=1.0, method="exact") as fam:
        fam(net(x[:0]), y[:0]).backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())
        fam(net(x), y)
        want = relative_flatness(net, CE(reduction=reduction), (x, y), layer=layer, curvature="ggn", method="exact")
        assert fam.last["kappa"] == pytest.approx(want.value, rel=1e-9)


# -- derivatives that are no numbers -------------------------------------------------------------------------


class Length(nn.Module):
    """Features of length 0 in a dead network: finite derivatives of the loss, none of its curvature."""

    def __init__(self, dead: bool) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 3))
        nn.init.constant_(self.a.bias, -50.0 if dead else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return (h.square().sum(1, keepdim=True).sqrt() * torch.ones_like(h)) @ self.w


@pytest.mark.parametrize("options", [{"curvature": "hessian"}, {"method": "exact"}], ids=str)
def test_a_penalty_whose_gradient_is_not_finite_is_left_out_also_later(options: dict[str, Any]) -> None:
    x, y = data()
    net = Length(dead=False).double()
    with FAM(CE(), net, "a", strength=1.0, **options) as fam, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fam(net(x), y).backward()
        assert fam.last["skipped"] == 0
        with torch.no_grad():
            net.a.bias.fill_(-50.0)
        net.zero_grad()
        fam(net(x), y).backward()
        assert fam.last["skipped"] == 1
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


POINTS = torch.linspace(-3, 2, 30).double().cos().reshape(3, 5, 2)


def bag(**options: Any) -> Callable[[Tensor], Tensor]:
    """A lookup of three bags, the last one empty, in the rows of a table."""
    looked_up, starts = torch.tensor([0, 3, 3, 11, 4, 7]), torch.tensor([0, 4, 6])
    return lambda x: F.embedding_bag(looked_up, x.flatten(0, 1), starts, **options)


ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "hardsigmoid": F.hardsigmoid,
    "cdist from": lambda x: torch.cdist(x, POINTS),
    "cdist to": lambda x: torch.cdist(POINTS, x),
    "cdist, p": lambda x: torch.cdist(x, POINTS, p=3),
    "cdist of itself": lambda x: torch.cdist(x[:, :2], x[:, 2:].sin()),
    "pdist": lambda x: F.pdist(x.flatten(0, 1)),
    "bags": bag(),
    "bags, sums": bag(mode="sum", padding_idx=3),
    "bags, means": bag(mode="mean", padding_idx=11),
    "bags, greatest": bag(mode="max"),
    "bags, weighted": bag(mode="sum", per_sample_weights=torch.linspace(1, 2, 6).double()),
}


# bags are linear in their table, so that only gy is left
@pytest.mark.parametrize(
    ("name", "of_both"), [(n, both) for n in ONCE for both in (True, False) if both or not n.startswith("bags")]
)
def test_operations_that_torch_differentiates_once_have_derivatives_of_every_order(name: str, of_both: bool) -> None:
    operation = ONCE[name]

    def gradient(x: Tensor, gy: Tensor) -> Tensor:
        y = operation(x * 1)
        with norms_mended([y], [x]):
            return torch.autograd.grad(y, x, gy, create_graph=True)[0]

    x = 3 * torch.randn(3, 4, 2).double()
    given = [x.requires_grad_(), torch.randn_like(operation(x)).requires_grad_(of_both)]
    assert torch.autograd.gradcheck(gradient, given)
    assert torch.autograd.gradgradcheck(gradient, given)


@pytest.mark.parametrize("how", [{}, {"method": "exact"}, {"curvature": "hessian", "method": "exact"}])
def test_kappa_through_a_hard_sigmoid_is_that_through_a_clamp(how: dict[str, Any]) -> None:
    class Clamp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x / 6 + 0.5).clamp(0, 1)

    (x, y), found = data(), []
    for gate in (Clamp(), nn.Hardsigmoid()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(x.shape[1], 6), gate, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(x)
        nn.init.normal_(net[0].weight, std=3.0)  # on both sides of the kinks
        with FAM(CE(), net, "*", strength=1.0, every=1, seed=0, **how) as fam:
            fam(net(x), y).backward()
            assert fam.last["by_layer"]["0"] > 0 or how.get("curvature") == "hessian"
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_the_default_trains_a_classifier_of_bags_of_words_by_distance() -> None:
    """PyTorch's own text example, with prototypes: the same as lookups, means and square roots written out."""

    class Bags(nn.Module):
        def __init__(self, written_out: bool) -> None:
            super().__init__()
            self.words, self.hidden = nn.EmbeddingBag(12, 5), nn.Linear(5, 4)
            self.prototypes, self.written_out = nn.Parameter(torch.randn(3, 4)), written_out

        def forward(self, x: Tensor) -> Tensor:
            if not self.written_out:
                return -torch.cdist(self.hidden(self.words(x)).tanh(), self.prototypes)
            h = self.hidden(F.embedding(x, self.words.weight).mean(1)).tanh()
            return -(h[:, None] - self.prototypes).square().sum(-1).sqrt()

    found = []
    for written_out in (True, False):
        torch.manual_seed(0)
        net, x, y = Bags(written_out).double(), torch.randint(12, (8, 6)), torch.randint(3, (8,))
        with FAM(CE(), net, "hidden", strength=1.0, method="exact") as fam:
            fam(net(x), y).backward()
        found.append([p.grad for p in net.parameters()])
        with FAM(CE(), net) as fam:
            fam(net(x), y).backward()
            assert {"hidden", "words.weight"} <= set(fam.last["by_layer"])
    torch.testing.assert_close(found[1], found[0])


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_layer_on_nested_tensors_is_named() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.stack([t.mean(0) for t in self.a(x).tanh().unbind()]))

    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3)], layout=torch.jagged)
    with FAM(CE(), net := Nested(), "a", strength=1.0) as fam, pytest.raises(RelflatError, match="nested"):
        fam(net(x), torch.tensor([0, 1]))
    with FAM(CE(), net := Nested(), "output", strength=1.0) as fam:
        fam(net(x), torch.tensor([0, 1])).backward()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_remedies_exist_where_they_are_named(curvature: str) -> None:
    """CTC has nothing to do with attention, and no second derivative."""
    x, y = data()
    fam = FAM(ctc, net := mlp(), "0", strength=1.0, curvature=curvature, method="exact")
    with pytest.raises(GraphError, match="ctc_loss") as error:
        fam(net(x), y)
    assert "scaled_dot" not in str(error.value)
    assert ("gradient='frozen'" in str(error.value)) == (curvature == "ggn")


@pytest.mark.parametrize("options", [{}, {"method": "probe"}, {"gradient": "frozen"}, {"radius": 0.1}], ids=str)
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_a_last_batch_of_one_that_is_squeezed_to_a_number(loss: nn.Module, options: dict[str, Any]) -> None:
    class Squeezed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    torch.manual_seed(0)
    net, (x, _) = Squeezed(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), data()
    with FAM(loss, net, "*", strength=1.0, **options) as fam:
        for n in (3, 1):
            fam(net(x[:n]), torch.rand(n).double().squeeze()).backward()
    flats = [
        relative_flatness(net, loss, (x[:1], t), layer="0", curvature="ggn", method="exact", forward=forward).value
        for t, forward in (
            (torch.tensor(0.3).double(), None),
            (torch.tensor([0.3]).double(), lambda model, batch: (model(batch[0]).reshape(1), batch[1])),
        )
    ]
    assert flats[0] == pytest.approx(flats[1], rel=1e-9)


@pytest.mark.parametrize(
    ("curvature", "known", "layer", "measured", "trained"),
    [
        ("hessian", True, "0", "exact", "probe(hessian, 1)"),
        ("hessian", False, "0", "exact", "probe(hessian, 1)"),
        ("ggn", True, "0", "probe(ggn, 16)", "probe(ggn, 1)"),
        ("ggn", False, "0", "exact", "probe(ggn, 1)"),
        ("hessian", True, "output", "closed_form", "closed_form"),
        ("hessian", False, "output", "exact", "exact"),
        ("ggn", True, "output", "closed_form", "closed_form"),
        ("ggn", False, "output", "exact", "exact"),
    ],
)
def test_which_method_is_taken(curvature: str, known: bool, layer: str, measured: str, trained: str) -> None:
    """Of a small layer before a ReLU: a short sum, but probes of a known loss take one pull-back for all layers."""
    (x, y), loss = data(), CE() if known else lambda z, t: z.pow(4).sum()
    assert relative_flatness(mlp(), loss, (x, y), layer=layer, curvature=curvature).method == measured
    with FAM(loss, net := mlp(), layer, strength=1.0, curvature=curvature) as fam:
        fam(net(x), y)
    assert fam.last["method"] == trained
