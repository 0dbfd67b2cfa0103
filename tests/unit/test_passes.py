"""Which forward passes belong to a criterion call, and what is left of those that belong to none."""

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import data, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from device import DEVICE
from relflat import GraphError, RelflatWarning, relative_flatness
from relflat.capture.calls import _MANY
from unbounded import FAM

CE = nn.CrossEntropyLoss


def kappa(weight: Tensor, loss) -> float:
    """Of the whole Hessian of a loss in a weight."""
    whole = torch.autograd.functional.hessian(lambda w: loss(w), weight.detach())
    return float(torch.einsum("ak,bk,ajbj->", weight, weight, whole))


def of_output(net: nn.Module, loss) -> float:
    """Of the output layer of ``mlp``, for a loss of functions of it."""
    run = lambda w: lambda x: F.linear(net[1](net[0](x)), w, net[2].bias)
    return kappa(net[2].weight, lambda w: loss(run(w)))


def mixed(c, m, x, y):
    out = m(x)
    return 0.3 * c(out, y) + 0.7 * c(out, y.flip(0))


def both_passes_then_both_losses(c, m, x, y):
    a, b = m(x), m(-x)
    return c(a, y) + c(b, y.flip(0))


def in_the_other_order(c, m, x, y):
    a, b = m(x), m(-x)
    return c(b, y.flip(0)) + c(a, y)


def losses_of_one_and_of_both(c, m, x, y):
    a = m(x)
    first = c(a, y)
    return first + c(torch.cat([a, m(-x)]), torch.cat([y, y]))


def passes_that_are_for_something_else(c, m, x, y):
    for _ in range(20):
        unused = m(2 * x)
    return c(m(x), y) + 0 * unused.detach().sum()


def passes_without_a_graph(c, m, x, y):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(9):
                m(x)
    return c(m(x), y)


def many_passes_behind_one_loss(c, m, x, y):
    return c(torch.cat([m(one[None]) for one in x.repeat(2, 1)]), y.repeat(2))


SITUATIONS = [f for f in list(globals().values()) if getattr(f, "__code__", None) and f.__code__.co_argcount == 4]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("by", ["the criterion", "penalty(loss)"])
def test_a_loss_takes_the_passes_it_was_computed_from(situation, by: str) -> None:
    net, (x, y) = mlp(), data()
    fam = FAM(CE(), net, "2", strength=0.5, curvature="hessian", method="exact")
    criterion = fam if by == "the criterion" else lambda out, t: (loss := CE()(out, t)) + fam.penalty(loss)
    for _ in range(2):
        net.zero_grad()
        total, plain = situation(criterion, net, x, y), situation(CE(), net, x, y)
        want = of_output(net, lambda run: situation(CE(), run, x, y))
        assert float(total - plain) / 0.5 == pytest.approx(want, rel=1e-9)
        total.backward()


@pytest.mark.parametrize(("situation", "steps"), [(mixed, 1), (both_passes_then_both_losses, 2)])
def test_losses_of_one_pass_are_one_step(situation, steps: int) -> None:
    net, (x, y) = mlp(), data()
    fam = FAM(CE(), net, "output", strength=1.0, every=2)
    on = []
    for _ in range(3):
        situation(fam, net, x, y).backward()
        on.append(fam.last["penalty"] > 0)
    assert fam.step == 3 * steps
    assert on == ([True, False, True] if steps == 1 else [False] * 3)


@pytest.mark.parametrize("how", ["backward", "dropped", "retained"])
def test_a_pass_lasts_as_long_as_a_loss_that_is_yet_to_be_used(how: str) -> None:
    net, (x, y) = mlp(), data()
    fam = FAM(CE(), net, "output", strength=1.0)
    args = x.clone()
    held = weakref.ref(args)
    loss = fam(net(args), y)
    del args
    if how == "dropped":
        del loss
    else:
        loss.backward(retain_graph=how == "retained")
        assert not any(used() for used in fam._tap._pending._used)
    gc.collect()
    assert (held() is not None) == (how == "retained")  # its graph keeps it then
    with pytest.raises(GraphError, match="run the model again"):
        fam(torch.ones(8, 3, dtype=torch.float64, requires_grad=True), y)


def test_passes_of_another_loss_are_dropped_when_their_graph_is_freed() -> None:
    net, (x, y) = mlp(), data()
    fam = FAM(CE(), net, "output", strength=1.0)
    for _ in range(30):
        CE()(net(x), y).backward()
    assert fam._tap.pending <= 8
    fam(net(x), y).backward()
    net(x)
    assert fam._tap.pending == 1


@pytest.mark.parametrize("where", ["a layer", "the model", "the loss", "an evaluation"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_criterion_goes_on_after_an_interrupt(where: str, error: type[BaseException]) -> None:
    net, (x, y) = mlp(nn.Identity()), data()
    fam = FAM(lambda out, t: stop() if "loss" in on else CE()(out, t), net, "output", strength=1.0)
    on: list[str] = []

    def stop(*args):
        raise error

    want = float(fam(net(x), y))
    at = {"a layer": net[3], "the model": net, "an evaluation": net[1]}.get(where)
    handle = at.register_forward_pre_hook(stop) if at is not None else None
    on += ["loss"] if where == "the loss" else []
    net.train(where != "an evaluation")
    with pytest.raises(error):
        fam(net(x), y)
    on.clear()
    if handle is not None:
        handle.remove()
    net.eval()
    net(x)
    assert fam._tap._open is None
    net.train()
    assert float(fam(net(x), y)) == want


def test_a_model_that_calls_itself_is_one_pass() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.down, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, depth=2):
            return self(self.down(x).tanh(), depth - 1) if depth else self.out(x)

    net, (x, y) = Tree().double(), data()
    fam = FAM(CE(), net, "down", strength=1.0, curvature="hessian", method="exact")
    loss = fam(net(x), y)
    down = lambda w, h: (h @ w.T + net.down.bias).tanh()
    want = kappa(net.down.weight, lambda w: CE()(net.out(down(w, down(w, x))), y))
    assert float(loss) == pytest.approx(want + float(CE()(net(x), y)), rel=1e-9)
    assert fam.step == 1


# -- computed weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_computed_weight_is_that_of_the_layer_and_no_cache_is_left(when: str, wrap, error) -> None:
    net, (x, y) = mlp(), data()
    if when == "before":
        wrap(net[2])
    fam = FAM(CE(), net, "2", strength=1.0)
    if when == "after":
        wrap(net[2])
    plain = copy.deepcopy(net)
    if error is not None:
        handle = net[2].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            net(x)
        handle.remove()
    seen: list[Tensor] = []
    net[2].parametrizations.weight.register_forward_hook(lambda *args: seen.append(args[-1].detach()))
    out = net(x)
    assert torch.equal(out, plain(x))  # power iteration has counted one evaluation
    fam(out, y)
    assert len(seen) == 1
    want = kappa(seen[0], lambda w: CE()(F.linear(net[1](net[0](x)), w, net[2].bias), y))
    assert fam.last["kappa"] == pytest.approx(want, rel=1e-9)
    assert parametrize._cache_enabled == 0


# -- models that are written down ----------------------------------------------------------------------------

WAYS = {
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "export strict": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
    "jit.trace": lambda m, x: torch.jit.trace(m, x),
    "jit.script": lambda m, x: torch.jit.script(m),
    "fx": lambda m, x: torch.fx.symbolic_trace(nn.Sequential(m)),
    "compile": lambda m, x: torch.compile(m, backend="eager"),
    "compile fullgraph": lambda m, x: torch.compile(m, backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_a_watched_model_is_exported_or_told_to_be_closed_first(way: str, training: bool) -> None:
    if way == "export strict" and torch.__version__ < (2, 10):
        pytest.skip("torch 2.8 and 2.9 raise an error of their own, after the FAM is closed too")
    net, (x, y) = mlp().train(training), data()
    fam = FAM(CE(), net, "0", strength=1.0, seed=0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way in ("jit.script", "compile fullgraph"):
            with pytest.raises(Exception, match=r"close"):  # of classes of torch's own
                WAYS[way](net, x)(x)
        else:
            torch.testing.assert_close(WAYS[way](net, x)(x), net(x))
    net.train()
    fam(net(x), y).backward()
    assert fam.last["kappa"] > 0
    fam.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(WAYS[way](net, x)(x), net(x))


# -- checkpointing -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block with running averages that is recomputed in the backward pass."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d, *, kept: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.out = nn.Linear(4, 5), norm(5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.kept = kept  # so that nothing is recomputed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        block = lambda h: self.b(self.norm(self.a(h)).tanh()).tanh()
        return self.out(block(x) if self.kept else checkpoint(block, x, use_reentrant=False))


@pytest.mark.parametrize("layer", ["a", "b", "out", "a.weight", ["a", "out"]])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_running_averages_in_a_checkpointed_block_are_those_of_plain_training(layer, curvature: str) -> None:
    plain, net, (x, y) = Checkpointed(), Checkpointed(), data()
    fam = FAM(CE(), net, layer, strength=1e-9, curvature=curvature, seed=0)
    for _ in range(2):
        CE()(plain(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fam(net(x), y).backward()
    for (name, ours), theirs in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("options", [{"curvature": "hessian"}, {"method": "exact"}, {"probes": 3}], ids=str)
@pytest.mark.parametrize("layer", ["a", "a.weight"])
def test_gradients_through_a_checkpointed_normalisation_are_those_without(layer, options, norm) -> None:
    """PyTorch hands a saved tensor out once there, and takes the statistics for constants in third derivatives."""
    found, smoothed = [], nn.CrossEntropyLoss(label_smoothing=0.1)
    for kept in (False, True):
        net, (x, y) = Checkpointed(norm, kept=kept), data()
        fam = FAM(smoothed, net, layer, strength=1.0, seed=0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fam(net(x), y).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


# -- measuring -----------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """As a layer of loralib: it merges its factors into the weight when it leaves training."""

    def __init__(self, m: int, d: int) -> None:
        super().__init__(m, d)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, m)), nn.Parameter(torch.randn(d, 2)), False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ self.a.mT @ self.b.mT


@pytest.mark.parametrize("modes", ["training", "evaluation", "mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_modules_whose_train_acts_as_they_were(modes: str, fails: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Merging(4, 5), nn.Tanh()), Merging(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    net.double().train(modes != "evaluation")
    if modes == "mixed":
        net[0].eval()
        net[2].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    before = [(m.training, getattr(m, "merged", None)) for m in net.modules()]
    x, y = data()
    try:
        relative_flatness(net, CE(), (x, y + 7 * fails), layer="3")
    except Exception:
        assert fails
    assert before == [(m.training, getattr(m, "merged", None)) for m in net.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


class Energy(nn.Module):
    """Its forward pass differentiates, where it can."""

    def __init__(self, *, needs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.needs = nn.Linear(4, 5).double(), nn.Linear(5, 1).double(), needs

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.b(self.a(x).tanh())
        if not self.needs and not torch.is_grad_enabled():
            return energy
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return self.b(self.a(force).tanh())


@pytest.mark.parametrize("options", [{}, {"normalize_features": True}, {"layer": "a"}], ids=str)
@pytest.mark.parametrize("needs", [True, False])
def test_a_model_that_differentiates_is_measured_over_batches_as_over_one(options, needs: bool) -> None:
    net, (x, _) = Energy(needs=needs), data()
    target = torch.zeros(len(x), 1, dtype=torch.float64)
    given = {"layer": "b", "method": "exact"} | options
    if "layer" in options:
        given["curvature"] = "ggn"
    one, many = (
        relative_flatness(net, nn.MSELoss(), batches, **given)
        for batches in ([(x, target)], list(zip(x.split(3), target.split(3), strict=True)))
    )
    assert many.value == pytest.approx(one.value, rel=1e-9)
    assert many.loss == pytest.approx(one.loss, rel=1e-9)


def test_steps_without_a_penalty_record_no_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    fam, strengths, calls = FAM(nn.CrossEntropyLoss(), net, "*", strength=1.0, every=3), [], []
    for _ in range(7):
        out = net(x)
        calls.append(sum(len(f.calls) for f in fam._tap._pending._fresh))
        fam(out, y).backward()
        strengths.append(fam.last["strength"])
    assert calls == [2, 0, 0, 2, 0, 0, 2]
    assert [s != 0 for s in strengths] == [n > 0 for n in calls]


def test_two_passes_of_which_one_may_have_a_penalty_are_both_recorded() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    fam, kappas = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0, every=2), []
    for _ in range(3):
        for out in [net(x), net(x)]:
            fam(out, y).backward()
            kappas.append("kappa" in fam.last)
    assert kappas == [True, False] * 3


def test_a_strength_that_comes_after_the_pass_began_is_said_to_come_too_late() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
    fam(net(x), y)
    fam.strength = 0.0
    out = net(x)
    fam.strength = 1.0
    with pytest.warns(RelflatWarning, match="strength was 0 when the forward pass of step 1 began"):
        loss = fam(out, y)
    assert loss.item() == nn.CrossEntropyLoss()(out, y).item()


class Remembers(nn.Module):
    """Writes to its buffers in any mode, in place and anew, as observers of quantisation and memory banks do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(0, 6, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        self.seen += 1
        self.bank = torch.cat([self.bank, h.detach()])
        return h


@pytest.mark.parametrize("method", ["exact", "finite_difference", "xtrace"])
def test_measuring_leaves_buffers_that_are_written_in_any_mode(method: str) -> None:
    net, (x, y) = mlp(Remembers(), nn.Tanh()), data()
    net(x)
    buffers = dict(net.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}
    relative_flatness(net, CE(), (x, y), layer="0", method=method)
    for name, b in net.named_buffers():
        assert b is buffers[name]
        assert torch.equal(b, before[name])


@pytest.mark.parametrize("options", [{"radius": 0.1}, {"method": "finite_difference", "curvature": "hessian"}])
@pytest.mark.parametrize(("model_in", "criterion_in"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_pass_that_is_run_again_has_the_precision_it_had(
    model_in: bool, criterion_in: bool, options: dict[str, Any]
) -> None:
    net, (x, y), types = mlp().float(), data(), []
    net[0].register_forward_hook(lambda module, args, out: types.append(out.dtype))

    def half(on: bool) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=on)

    with FAM(CE(), net, "0", strength=0.5, **options) as fam:
        with half(model_in):
            z = net(x.float())
        with half(criterion_in):
            fam(z, y).backward()
    assert len(types) > 1
    assert set(types) == {torch.bfloat16 if model_in else torch.float32}


def test_a_view_of_a_view_of_the_outputs_is_the_same_in_a_pass_that_is_run_again() -> None:
    class Rear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, 3:]

    net, (x, y) = Rear().double(), data()
    options = {"strength": 0.5, "curvature": "hessian", "layer": "layer"}
    with FAM(CE(), net, method="exact", **options) as exact:
        exact(net(x)[:, 2:5], y)
    with FAM(CE(), net, method="finite_difference", probes=400, **options) as repeated:
        repeated(net(x)[:, 2:5], y)
    assert repeated.last["kappa"] == pytest.approx(exact.last["kappa"], rel=0.2)
    row, inner = (
        net.layer.weight.detach()[5:8],
        x.square().sum(1),
    )  # on paper: sum_ab <w_a, w_b> (p_a [a = b] - p_a p_b)
    p = net(x)[:, 2:5].detach().softmax(1)
    want = (inner * (p @ row.square().sum(1) - (p @ row).square().sum(1))).mean()
    assert exact.last["kappa"] == pytest.approx(float(want), rel=1e-9)


def test_passes_that_wait_are_said_once_when_they_are_many() -> None:
    net, (x, y) = mlp(), data()
    with FAM(CE(), net, "0", strength=0.5) as fam:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(_MANY - 1):
                net(x)
        with pytest.warns(RelflatWarning, match=f"^{_MANY} training forward passes wait"):
            net(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(10):
                net(x)
            fam(net(x), y)
            relative_flatness(net, CE(), [(x, y)] * (_MANY + 1), layer="0", method="probe")
