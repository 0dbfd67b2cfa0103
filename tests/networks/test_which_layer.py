"""Which layer is meant, and by what it is one: "output", globs, own forwards, hooks, layers that are replaced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import Net
from dense import hessian
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from relflat import (
    LayerError,
    RelflatWarning,
    SecondDerivativeError,
    reference,
    relative_flatness,
    relative_flatness_by_layer,
)
from relflat.capture.kinds import is_linear, kind_of
from unbounded import FAM

LINEAR = kind_of(nn.Linear(1, 1))
assert LINEAR is not None
CE = nn.CrossEntropyLoss()
IN, CLASSES, N = 4, 3, 6


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, IN, generator=g).double(), torch.randint(CLASSES, (N,), generator=g)


def kappa(weight: nn.Parameter, loss: Callable[[], Tensor], view: Callable[[Tensor], Tensor] = lambda w: w) -> float:
    """Definition 3 of a parameter with all of its uses, seen as (d, m), from the dense Hessian."""
    W, place = view(weight.detach()), view(torch.arange(weight.numel()).reshape(weight.shape)).reshape(-1)
    H = hessian(loss(), weight)[place][:, place]
    return reference.kappa_of_hessian(W, H.reshape(*W.shape, *W.shape)).item()


def mlp(**first: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first.get("layer") or nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 3 * self.weight, self.bias)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), self.bias)


class SameConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 0)), self.weight, self.bias)


def hooked(net: nn.Sequential, at: int) -> None:
    net[at].register_forward_hook(lambda module, args, out: 3 * out)


def overwritten(net: nn.Sequential, at: int) -> None:
    net[at].register_forward_hook(lambda module, args, out: out.mul_(3))


def patched(net: nn.Sequential, at: int) -> None:
    net[at].forward = (lambda own: lambda z: 3 * own(z))(net[at].forward)


class TestByWhatItComputes:
    @pytest.mark.parametrize(
        ("layer", "method"), [(Same, "exact"), (Scaled, "exact(weight)"), (Standardised, "exact(weight)")]
    )
    def test_a_forward_of_its_own(self, layer: type[nn.Linear], method: str) -> None:
        net, (x, y) = mlp(layer=layer(IN, 5)), batch()
        flat = relative_flatness(net, CE, (x, y), layer="0", method="exact")
        assert flat.method == method
        assert flat.value == pytest.approx(kappa(net[0].weight, lambda: CE(net(x), y)), rel=1e-9)
        with FAM(CE, net, "0", strength=1.0, curvature="hessian", method="exact") as fam:
            fam(net(x), y)
        assert fam.last["kappa"] == pytest.approx(flat.value, rel=1e-9)

    @pytest.mark.parametrize(
        ("dtype", "off", "linear"),
        [
            *((torch.float64, 2.5e-8, True), (torch.float64, 3.5e-8, False)),
            *((torch.float32, 6e-4, True), (torch.float32, 8e-4, False)),
            *((torch.bfloat16, 0.02, True), (torch.bfloat16, 0.045, False)),
        ],
    )
    def test_what_rounding_may_change(self, dtype: torch.dtype, off: float, linear: bool) -> None:
        """Twice the root of the precision, and at most 3 %, of the larger of the two, sample by sample."""
        layer, x = nn.Linear(IN, 400, bias=False).to(dtype), torch.randn(3, IN, dtype=dtype)
        for wrong in ([0], [1], [2], [0, 1, 2]):
            z = (x.double() @ layer.weight.detach().double().mT).index_fill(0, torch.tensor(wrong), 0)
            z = z + (1 + off) * (x.double() @ layer.weight.detach().double().mT - z)
            output = z if dtype == torch.float64 else z.float()  # the coarsest of input, weight and output counts
            assert is_linear(LINEAR, layer, x, layer.weight, output) is linear, wrong

    def test_two_samples_are_looked_at_by_turns(self) -> None:
        layer, x = nn.Linear(IN, 5), torch.randn(4, IN)
        for wrong in range(4):
            y = layer(x).detach()
            y[wrong] *= 3
            found = [is_linear(LINEAR, layer, x, layer.weight, y, turn) for turn in range(8)]
            assert found == [wrong not in (0, turn % 4) for turn in range(8)]

    def test_a_convolution_that_pads_by_itself(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(SameConv(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * IN, CLASSES)).double()
        x, y = batch()
        flat = relative_flatness(net, CE, (x[:, None], y), layer="0", method="exact")
        want = kappa(net[0].weight, lambda: CE(net(x[:, None]), y), lambda w: w.flatten(1))
        assert flat.value == pytest.approx(want, rel=1e-9)

    @pytest.mark.parametrize("at", [0, 2])
    @pytest.mark.parametrize("change", [hooked, overwritten, patched])
    @pytest.mark.parametrize("late", [False, True])
    def test_a_changed_output_is_not_taken_for_the_layers(
        self, change: Callable[[nn.Sequential, int], None], at: int, late: bool
    ) -> None:
        net, (x, y) = mlp(), batch()
        if not late:
            change(net, at)
        with FAM(CE, net, str(at), strength=1.0, curvature="hessian", method="exact") as fam:
            if late:
                change(net, at)
            fam(net(x), y)
            want = kappa(net[at].weight, lambda: CE(net(x), y))
        assert fam.last["kappa"] == pytest.approx(want, rel=1e-9)

    def test_a_weight_that_cannot_be_taken_is_refused(self) -> None:
        net, (x, y) = mlp(layer=Scaled(IN, 5)), batch()
        net[0].weight.requires_grad_(False)
        with pytest.raises(LayerError, match=r"'0' is taken in its weight, and that is frozen"):
            relative_flatness(net, CE, (x, y), layer="0")

    @pytest.mark.parametrize("limit", [1e9, 0.5])
    def test_an_embedding_that_is_renormalised(self, limit: float) -> None:
        def run(m: Any, ids: Tensor) -> Tensor:
            return m.head(m.table(ids).mean(1).tanh())

        ids, (_, y) = torch.randint(5, (N, 3)), batch()
        torch.manual_seed(0)
        net = Net(run, table=nn.Embedding(5, 3, max_norm=limit), head=nn.Linear(3, CLASSES)).double()
        net(ids)  # brings the rows within the limit
        plain = Net(run, table=nn.Embedding.from_pretrained(net.table.weight.detach()), head=net.head).double()
        plain.table.weight.requires_grad_()
        want = kappa(plain.table.weight, lambda: CE(plain(ids), y), lambda w: w.mT)
        for layer in ("table", "table.weight"):
            flat = relative_flatness(net, CE, (ids, y), layer=layer, method="exact")
            assert flat.value == pytest.approx(want, rel=1e-9)


def put(net: nn.Sequential, at: int) -> nn.Module:
    torch.manual_seed(9)
    net[at] = nn.Linear(IN if at == 0 else 5, 5 if at == 0 else CLASSES).double()
    return net[at]


class TestReplaced:
    @pytest.mark.parametrize(("layer", "at"), [("output", 2), ("0", 0), ("*", 2)])
    def test_the_layer_that_has_the_name_now_is_regularised(self, layer: str, at: int) -> None:
        net, (x, y) = mlp(), batch()
        fam = FAM(CE, net, layer, strength=1.0, curvature="hessian", method="exact")
        fam(net(x), y)
        old, new = net[at], put(net, at)
        fam(net(x), y)
        want = kappa(new.weight, lambda: CE(net(x), y))
        assert fam.last["by_layer"][str(at)] == pytest.approx(want, rel=1e-9)
        assert not old._forward_hooks

    def test_a_block_around_it(self) -> None:
        net = nn.Sequential(nn.Sequential(nn.Linear(IN, 5)), nn.Linear(5, CLASSES)).double()
        x, y = batch()
        fam = FAM(CE, net, "0.0", strength=1.0)
        fam(net(x), y)
        net[0] = nn.Sequential(nn.Linear(IN, 5)).double()
        fam(net(x), y)
        assert fam.last["kappa"] > 0

    @pytest.mark.parametrize(("part", "said"), [(nn.Identity(), "replaced by a Identity"), (None, "is gone")])
    def test_something_else_is_refused(self, part: nn.Module | None, said: str) -> None:
        net, (x, _) = mlp(), batch()
        fam = FAM(CE, net, "2", strength=1.0)
        if part is None:
            del net[2]
        else:
            net[2] = part
        with pytest.raises(LayerError, match=said):
            net(x)
        fam.close()
        net(x)


def tied(m: Any, ids: Tensor) -> Tensor:
    return F.linear(m.mid(m.emb(ids).mean(1)).tanh(), m.emb.weight)


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a hidden layer has the name": (
        lambda: Net(lambda m, x: m.last(m.output(x).tanh()), output=nn.Linear(IN, 5), last=nn.Linear(5, CLASSES)),
        "last",
    ),
    "a container has the name": (
        lambda: Net(
            lambda m, x: m.output(m.body(x)),
            body=nn.Linear(IN, 5),
            output=nn.Sequential(nn.Tanh(), nn.Linear(5, CLASSES)),
        ),
        "output.1",
    ),
    "an auxiliary output": (
        lambda: Net(
            lambda m, x: {"logits": m.last(h := m.body(x)), "hidden": h},
            body=nn.Linear(IN, CLASSES),
            last=nn.Linear(CLASSES, CLASSES),
        ),
        "last",
    ),
    "another call after it": (
        lambda: Net(
            lambda m, x: (z := m.last(m.body(x).tanh()), m.probe(z.detach()))[0],
            body=nn.Linear(IN, 5),
            last=nn.Linear(5, CLASSES),
            probe=nn.Linear(CLASSES, 1),
        ),
        "last",
    ),
    "computed upon": (
        lambda: Net(lambda m, x: m.last(m.body(x).tanh()) / 2, body=nn.Linear(IN, 5), last=nn.Linear(5, CLASSES)),
        "last",
    ),
}


class TestOutput:
    @pytest.mark.parametrize("name", OUTPUTS)
    def test_the_layer_that_the_loss_was_computed_from(self, name: str) -> None:
        build, want = OUTPUTS[name]
        net, (x, y) = build().double(), batch()
        loss = lambda out, y: CE(out["logits"] if isinstance(out, dict) else out, y)
        assert relative_flatness(net, loss, (x, y), layer="output").layer == want
        for use in (lambda f, z: f(z, y), lambda f, z: f.penalty(loss(z, y))):
            with FAM(loss, net, "output", strength=1.0, curvature="hessian") as fam:
                use(fam, net(x))
            assert fam.layers == [want]

    @pytest.mark.parametrize(
        ("run", "said"),
        [
            (tied, r"no layer that was called.*layer='emb\.weight'"),
            (lambda m, ids: m.rnn(m.emb(ids))[0][:, -1], r"'rnn\.weight_"),
            (lambda m, ids: m.mid(m.emb(ids).mean(1)) + m.other(m.emb(ids).sum(1)), r"ambiguous.*'mid', 'other'"),
        ],
    )
    def test_unsure_is_an_error_that_lists_candidates(self, run: Callable[..., Tensor], said: str) -> None:
        parts = {"emb": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "other": nn.Linear(4, 4), "rnn": nn.LSTM(4, 4)}
        net = Net(run, **parts).double()
        with pytest.raises(LayerError, match=said):
            relative_flatness(net, CE, (torch.randint(5, (N, 3)), batch()[1]), layer="output")


def everything(m: Any, ids: Tensor) -> Tensor:
    h = m.emb(ids) + m.position + m.scale * m.emb(ids)
    with sdpa_kernel(SDPBackend.MATH):
        h = m.attention(h, h, h, need_weights=False)[0].mean(1) @ m.projection
    return F.linear(m.twice_a(m.twice_b(h).tanh()).tanh(), m.emb.weight)


class TestGlobs:
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        net = Net(
            everything,
            emb=nn.Embedding(5, 4),
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
            twice_a=nn.Linear(4, 4),
            twice_b=nn.Linear(4, 4),
            spare=nn.Linear(4, 4),
        )
        net.twice_b.weight = net.twice_a.weight
        net.position, net.projection = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 4))
        net.scale = nn.Parameter(torch.randn(1, 4))
        return net.double()

    def test_every_matrix_once_with_all_of_its_uses(self) -> None:
        net = self.network()
        ids, y = torch.randint(5, (N, 3)), torch.randint(5, (N,))
        with pytest.warns(RelflatWarning, match=r"left out.*'spare', 'position', 'scale'"):
            found = relative_flatness_by_layer(net, CE, (ids, y), layer="*", method="exact")
        views = {"projection": lambda w: w.mT}
        own = {"attention.out_proj": net.attention.out_proj.weight}
        names = ["emb.weight", "attention.out_proj", "twice_a.weight", "projection", "attention.in_proj_weight"]
        assert sorted(found) == sorted(names)
        for name, flat in found.items():
            parameter = own.get(name) if name in own else net.get_parameter(name)
            want = kappa(parameter, lambda: CE(net(ids), y), views.get(name, lambda w: w))
            assert flat.value == pytest.approx(want, rel=1e-8), name

    @pytest.mark.filterwarnings("ignore:left out", "ignore:kappa of layer")
    @pytest.mark.parametrize("options", [{"layers_per_step": 2}, {"radius": 0.1}, {"curvature": "hessian"}])
    def test_it_trains(self, options: dict[str, Any]) -> None:
        net = self.network()
        ids, y = torch.randint(5, (N, 3)), torch.randint(5, (N,))
        fam = FAM(CE, net, "*", strength=0.1, **options)
        for _ in range(2):
            fam(net(ids), y).backward()
        assert "spare" not in fam.layers

    def test_a_layer_made_of_others_counts_once(self) -> None:
        peft = pytest.importorskip("peft")
        net, (x, y) = mlp(), batch()
        with FAM(CE, net, "*", strength=1.0, curvature="hessian", method="exact") as fam:
            fam(net(x), y)
        plain = fam.last["kappa"]
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"])).double()
        fam = FAM(CE, net, "*", strength=1.0, curvature="hessian", method="exact")
        fam(net(x), y)
        assert fam.layers == ["base_model.model.0", "base_model.model.2"]
        assert fam.last["kappa"] == pytest.approx(plain, rel=1e-9)

    def test_nothing_is_an_error(self) -> None:
        net, (x, y) = mlp(), batch()
        net.spare = nn.Linear(2, 2)
        net.forward = lambda x: net[2](net[1](net[0](x)))
        with pytest.raises(LayerError, match=r"none of .'spare'. took part"):
            relative_flatness_by_layer(net, CE, (x, y), layer="spar*")


def by_differences(weight: nn.Parameter, loss: Callable[[], Tensor], h: float = 2e-3) -> float:
    """Definition 3 as second differences of the loss alone: the weight moves by its column t in the place of j."""
    W, total = weight.detach().clone(), 0.0
    with torch.no_grad():
        for t in range(W.shape[1]):
            for j in range(W.shape[1]):
                for k, factor in ((0, -30.0), (1, 16.0), (-1, 16.0), (2, -1.0), (-2, -1.0)):
                    weight.copy_(W)
                    weight[:, j] += k * h * W[:, t]
                    total += factor * float(loss()) / (12 * h * h)
        weight.copy_(W)
    return total


def test_weights_that_a_stock_encoder_uses_without_calling_their_layers() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(IN, 2, 5, dropout=0.0, batch_first=True)
    net = nn.Sequential(
        nn.Unflatten(1, (1, IN)), nn.TransformerEncoder(block, 1), nn.Flatten(), nn.Linear(IN, CLASSES)
    )
    x, y = batch()
    found = relative_flatness_by_layer(net.double(), CE, (x, y), layer="*", method="exact")
    name = "1.layers.0.self_attn.out_proj"
    assert found[name].method == "exact(weight)"
    want = by_differences(net.get_parameter(f"{name}.weight"), lambda: CE(net(x), y))
    assert found[name].value == pytest.approx(want, rel=1e-5)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Packed(nn.Linear):
    def forward(self, x: PackedSequence) -> PackedSequence:
        return x._replace(data=super().forward(x.data))


def packed(m: Any, x: Tensor) -> Tensor:
    rows = pack_padded_sequence(x[:, None], torch.ones(len(x)), batch_first=True)
    return m.head(pad_packed_sequence(m.a(rows), batch_first=True)[0][:, 0].tanh())


@pytest.mark.parametrize(
    ("layer", "run"), [(Pair, lambda m, x: m.head(m.a(x)[0].tanh())), (Packed, packed)], ids=["pair", "packed"]
)
def test_a_layer_of_something_else_than_a_tensor_is_taken_by_its_weight(layer: type[nn.Linear], run: Any) -> None:
    torch.manual_seed(0)
    net, (x, y) = Net(run, a=layer(IN, 5), head=nn.Linear(5, CLASSES)).double(), batch()
    want = kappa(net.a.weight, lambda: CE(net(x), y))
    with pytest.raises(LayerError, match=r"name that: 'a\.weight'"):
        relative_flatness(net, CE, (x, y), layer="a")
    assert relative_flatness(net, CE, (x, y), layer="a.weight", method="exact").value == pytest.approx(want, rel=1e-9)
    found = relative_flatness_by_layer(net, CE, (x, y), layer="*", method="exact")
    assert {name: flat.method for name, flat in found.items()} == {"a": "exact(weight)", "head": "exact"}
    assert found["a"].value == pytest.approx(want, rel=1e-9)


def test_a_gradient_that_is_scaled_by_frequency_is_no_derivative() -> None:
    """In the outputs an embedding has kappa as any other; in its weight autograd would have another."""
    ids, (_, y) = torch.randint(5, (N, 3)), batch()
    found = []
    for scaled in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, scale_grad_by_freq=scaled)
        net = Net(lambda m, i: m.head(m.table(i).mean(1).tanh()), table=table, head=nn.Linear(3, CLASSES)).double()
        found += [relative_flatness(net, CE, (i, y), layer="table", method="exact").value for i in (ids, ids.int())]
        if scaled:
            with pytest.raises(SecondDerivativeError, match="scale_grad_by_freq"):
                relative_flatness(net, CE, (ids, y), layer="table.weight", method="exact")
    want = kappa(net.table.weight, lambda: CE(net(ids), y), lambda w: w.mT)
    assert found == pytest.approx([want] * 4, rel=1e-9)
