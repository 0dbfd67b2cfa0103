"""The tap: which layer, which calls, and nothing kept alive."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from relflat import GraphError, LayerError, RelflatWarning
from relflat.capture.resolve import resolve
from relflat.capture.tap import Tap
from unbounded import FAM


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 2)})
        self.spare = nn.Linear(5, 5)
        self.pool = nn.AdaptiveAvgPool1d(1)

    def forward(self, x):
        h = self.trunk(x).relu()
        return {"a": self.heads["a"](h), "b": self.heads["b"](h)}


class Parts(nn.Module):
    """A part that is None, as ``downsample`` of a block, and one that is held twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        self.b.add_module("again", self.act)
        self.register_module("downsample", None)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def test_modules_that_are_none_or_held_twice() -> None:
    (x, y), found = batch(), []
    for make in (Parts, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))):
        torch.manual_seed(0)
        net = make().double()
        with FAM(nn.CrossEntropyLoss(), net, "*", strength=1.0, method="exact") as fam:
            fam(net(x), y)
            found.append(list(fam.last["by_layer"].values()))
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1])


class Gate(nn.Module):
    """A matrix of its own, beside a part that has one too."""

    def __init__(self) -> None:
        super().__init__()
        self.P, self.inner = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.P * self.inner(x).sigmoid()


class TestResolve:
    def test_a_module_stands_for_the_only_matrix_of_its_own(self) -> None:
        net = nn.Sequential(Gate(), nn.Linear(4, 3))
        assert list(resolve(net, "0").values()) == [net[0].P]

    def test_a_module_a_name_a_glob_and_a_list(self) -> None:
        net = Branches()
        assert list(resolve(net, net.trunk)) == ["trunk"]
        assert list(resolve(net, "heads.a")) == ["heads.a"]
        assert list(resolve(net, "heads.*")) == ["heads.a", "heads.b"]
        assert list(resolve(net, ["trunk", net.heads["b"]])) == ["trunk", "heads.b"]

    @pytest.mark.parametrize(
        ("layer", "said"),
        [
            ("head", "no layer named 'head'.*heads.a"),
            ("heads", "ModuleDict is not a layer.*candidates: .'heads.a', 'heads.b'"),
            ("pool", "AdaptiveAvgPool1d is not a layer"),
            ("*.c", "no layer named"),
            ([], "empty"),
            (nn.Linear(2, 2), "not part of this model"),
        ],
    )
    def test_errors_name_the_candidates(self, layer, said: str) -> None:
        with pytest.raises(LayerError, match=said):
            resolve(Branches(), layer)

    def test_no_supported_layer(self) -> None:
        with pytest.raises(LayerError, match="no supported layer"):
            resolve(nn.Sequential(nn.ReLU()), "output")


class TestOutput:
    def test_found_by_memory_not_by_order_of_registration(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head, self.body = nn.Linear(5, 3), nn.Linear(4, 5)

            def forward(self, x):
                return self.head(self.body(x).relu())

        net = Odd()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        fam(net(torch.randn(2, 4)), torch.tensor([0, 1]))
        assert fam.layers == ["head"]
        assert fam.last["method"] == "closed_form"

    def test_two_heads_are_ambiguous(self) -> None:
        net = Branches()
        fam = FAM(lambda out, y: out["a"].square().mean() + out["b"].square().mean(), net, "output", strength=1.0)
        out = net(torch.randn(2, 4))
        with pytest.raises(LayerError, match=r"ambiguous.*heads\.a.*heads\.b"):
            fam(out, None)
        assert len(fam.layers) > 1

    def test_the_head_that_the_loss_is_computed_from(self) -> None:
        net = Branches()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        fam(net(torch.randn(2, 4))["b"], torch.tensor([0, 1]))
        assert fam.layers == ["heads.b"]

    def test_softmax_at_the_end_still_finds_the_last_linear(self) -> None:
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(-1)).double()
        fam = FAM(nn.NLLLoss(), net, "output", strength=1.0, curvature="hessian")
        x, y = batch()
        fam(net(x), y)
        assert fam.layers == ["2"]

    def test_the_model_may_be_the_layer(self) -> None:
        net = nn.Linear(4, 3).double()
        x, y = batch()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        fam(net(x), y)
        assert fam.last["method"] == "closed_form"


class TestOrder:
    def test_before_any_forward(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        _, y = batch()
        with pytest.raises(GraphError, match="no training forward pass"):
            fam(torch.zeros(6, 3, requires_grad=True), y)

    def test_twice_after_one_forward(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        out = net(x)
        fam(out, y)
        with pytest.raises(GraphError, match="no training forward pass"):
            fam(out, y)

    def test_outputs_of_another_model(self) -> None:
        net, other = mlp(), mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "2", strength=1.0)
        x, y = batch()
        net(x)
        with pytest.raises(GraphError, match="does not depend"):
            fam(other(x), y)

    def test_outputs_detached_or_no_grad(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        with pytest.raises(GraphError, match="carries no graph"):
            fam(net(x).detach(), y)
        with torch.no_grad(), pytest.raises(GraphError, match=r"model.eval\(\)"):
            fam(net(x), y)

    def test_calling_a_part_of_the_model(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        with pytest.raises(GraphError, match="not one of its parts"):
            fam(net[2](net[0](x)), y)

    def test_unused_layer(self) -> None:
        net = Branches()
        fam = FAM(lambda o, y: o["a"].square().mean(), net, "spare", strength=1.0)
        out = net(torch.randn(2, 4))
        with pytest.raises(LayerError, match=r"'spare' was not called.*trunk"):
            fam(out, None)

    def test_an_exception_in_forward_leaves_nothing_behind(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        with pytest.raises(RuntimeError):
            net(torch.randn(2, 7, dtype=torch.float64))
        with pytest.raises(GraphError, match="no training forward"):
            fam(torch.zeros(6, 3, requires_grad=True), y)
        fam(net(x), y).backward()
        assert fam.last["method"] == "closed_form"

    def test_forgotten_forwards_are_an_error_not_a_leak(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        with pytest.warns(RelflatWarning, match="64 training forward passes wait"):
            kept = [net(x) for _ in range(1030)]
        with pytest.raises(GraphError, match="more than 1024 training forward passes"):
            fam(kept[-1], y)
        for _ in range(20):
            net(x)
        fam.reset()
        fam(net(x), y)

    def test_an_unused_forward_before_does_not_change_the_value(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        fam(net(x), y)
        alone = fam.last["kappa"]
        net(torch.randn(9, 4, dtype=torch.float64))
        fam(net(x), y)
        assert fam.last["kappa"] == alone
        assert fam.last["method"] == "closed_form"

    def test_evaluation_mode_is_the_plain_criterion_and_records_nothing(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        net.eval()
        assert fam(net(x), y) == nn.CrossEntropyLoss()(net(x), y)
        net.train()
        with pytest.raises(GraphError, match="no training forward"):
            fam(torch.zeros(6, 3, requires_grad=True), y)


class TestLife:
    def test_nothing_is_kept_alive_after_the_loss_was_used(self) -> None:
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        x, y = batch()
        hidden = []
        net[1].register_forward_hook(lambda m, a, o: hidden.append(weakref.ref(o)))
        out = net(x)
        refs = [*hidden, weakref.ref(out)]
        loss = fam(out, y)
        loss.backward()
        del loss, out
        gc.collect()
        assert [r() for r in refs] == [None, None]

    def test_dropping_or_closing_removes_the_hooks(self) -> None:
        net = mlp()
        hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        assert hooks() > 0
        del fam
        gc.collect()
        assert hooks() == 0
        with FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0):
            assert hooks() > 0
        assert hooks() == 0

    def test_copies_of_the_model_carry_inert_hooks(self) -> None:
        net = mlp()
        x, y = batch()
        fam = FAM(nn.CrossEntropyLoss(), net, "output", strength=1.0)
        net(x)
        replica, again = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        fam.reset()
        for copied in (replica, again):
            assert torch.equal(copied(x), net(x))
        fam.reset()
        fam(net(x), y).backward()
        assert fam.last["method"] == "closed_form"

    def test_a_copied_criterion_says_that_it_is_closed(self) -> None:
        class Lit(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = mlp()
                self.criterion = FAM(nn.CrossEntropyLoss(), self.net, "2", strength=1.0)

        x, y = batch()
        replica = copy.deepcopy(Lit())
        with pytest.raises(GraphError, match="copy"):
            replica.criterion(replica.net(x), y)
        replica.eval()
        assert replica.criterion(replica.net(x), y) == nn.CrossEntropyLoss()(replica.net(x), y)

    @pytest.mark.parametrize("fails", [False, True])
    def test_hooks_do_not_outlive_a_measurement(self, fails: bool) -> None:
        from relflat import relative_flatness

        net = mlp()
        x, y = batch()
        if fails:
            with pytest.raises(Exception, match=r".*"):
                relative_flatness(net, nn.CrossEntropyLoss(), [(x, y + 7)], layer="output")
        else:
            relative_flatness(net, nn.CrossEntropyLoss(), [(x, y)], layer="output")
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


class TestCalls:
    def test_checkpointing_recomputes_without_disturbing(self) -> None:
        class Checkpointed(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=False)

        x, y = batch()
        grads = []
        for wrap in (lambda m: m, Checkpointed):
            net = wrap(mlp())
            fam = FAM(nn.CrossEntropyLoss(), net, ["*0", "*2"], strength=0.5, seed=3)
            fam(net(x), y).backward()
            grads.append([p.grad for p in net.parameters()])
            assert not fam._tap._pending
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)

    def test_reentrant_checkpointing_is_refused_with_the_remedy(self) -> None:
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.head = mlp(), nn.Linear(3, 3).double()

            def forward(self, x):
                return self.head(checkpoint(self.inner, x, use_reentrant=True))

        net = Checkpointed()
        fam = FAM(nn.CrossEntropyLoss(), net, "inner.2", strength=0.5)
        x, y = batch()
        with pytest.raises(GraphError, match="use_reentrant=False"):
            fam(net(x.requires_grad_()), y)

    def test_in_place_activation_after_the_layer(self) -> None:
        x, y = batch()
        values = []
        for inplace in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3)).double()
            fam = FAM(nn.CrossEntropyLoss(), net, "0", strength=0.5, curvature="hessian", method="exact")
            fam(net(x), y).backward()
            values.append((fam.last["kappa"], net[0].weight.grad))
        assert values[0][0] == values[1][0]
        torch.testing.assert_close(values[0][1], values[1][1], rtol=0, atol=0)

    def test_logits_overwritten_in_place_are_not_taken_for_the_layers_output(self) -> None:
        x, y = batch()
        net = mlp()
        fam = FAM(nn.CrossEntropyLoss(), net, "2", strength=0.5, method="closed_form")
        out = net(x)
        out *= 2
        with pytest.raises(ValueError, match="something is computed between"):
            fam(out, y)

    def test_taps_do_not_see_each_other(self) -> None:
        x, y = batch()
        net = mlp()
        one = FAM(nn.CrossEntropyLoss(), net, "2", strength=0.5)
        two = FAM(nn.CrossEntropyLoss(), net, "2", strength=0.5)
        out = net(x)
        a, b = one(out, y), two(out, y)
        assert a == b

    def test_input_modified_in_place(self) -> None:
        class Wrong(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 3)
                self.fc.requires_grad_(False)
                self.head = nn.Linear(3, 3)

            def forward(self, x):
                out = self.head(self.fc(x).relu())
                x.zero_()
                return out

        net = Wrong()
        fam = FAM(nn.CrossEntropyLoss(), net, "fc", strength=0.5)
        out = net(torch.randn(2, 4))
        with pytest.raises(GraphError, match="modified in place"):
            fam(out, torch.tensor([0, 1]))

    def test_tap_directly(self) -> None:
        net = mlp()
        tap = Tap(net, ["0", "2"])
        x, _ = batch()
        net(x)
        (record,) = tap.take()
        assert [c.layer for c in record.calls] == ["0", "2"]
        assert record.calls[0].phi is x
        tap.close()
        with pytest.raises(GraphError, match="closed"):
            tap.take()
