"""Whether samples are coupled is found out again when precision or modes change, or operations may reorder them."""

from collections.abc import Callable
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import data, mlp
from torch import Tensor, nn

from relflat.estimate.coupling import _splits, may_reorder
from relflat.rng import Rng
from unbounded import FAM

CE = nn.CrossEntropyLoss


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_coupling_is_seen_in_half_precision_and_again_when_modes_change(curvature: str) -> None:
    x, y = data(2048)
    for dtype in (torch.float32, torch.bfloat16):
        net = mlp(nn.BatchNorm1d(6), nn.Tanh()).to(dtype)
        fam = FAM(CE(), net, "0", strength=1.0, curvature=curvature)
        net[1].eval()
        fam(net(x.to(dtype)), y)
        net[1].train()
        fam(net(x.to(dtype)), y)
        assert list(fam._estimator.memory.coupled.values()) == [False, True], dtype


class Mixed(nn.Module):
    """Three layers with an operation of a kind after the first."""

    def __init__(self, mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.mix = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.mix(self.a(x)).tanh()).relu())


def attended(h: torch.Tensor, first: bool) -> torch.Tensor:
    """Attention over four tokens of two numbers, or over the samples."""
    q = h.reshape(len(h), 4, 2)
    q = q if first else q.transpose(0, 1)
    out = (q @ q.mT).softmax(-1) @ q
    return (out if first else out.transpose(0, 1)).reshape(len(h), 8)


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("mix", "coupled"),
    [
        (lambda h: h * h.sigmoid() + 1, False),
        (lambda h: attended(h, first=True), False),
        (lambda h: attended(h, first=False), True),
        (lambda h: torch.cat([h[:, :4], h[:, 4:].flip(1)], dim=1), False),
        (lambda h: h[torch.arange(len(h))], False),
        (lambda h: h + h.flip(0), True),
        (lambda h: h - h.mean(0), True),
        (lambda h: h * h.sum(1), True),  # as many samples as numbers
        (lambda h: h.t().reshape(8, 8).t(), False),
        (lambda h: h.view(-1).view(4, 16).cumsum(1).view(8, 8), True),
        (nn.BatchNorm1d(8), True),
        (nn.BatchNorm1d(8).eval(), False),
        (nn.GroupNorm(2, 8), False),
    ],
)
def test_what_is_known_of_operations_is_what_derivatives_say(mix, coupled: bool, curvature: str, monkeypatch) -> None:
    """By the names of operations, and again with none of them known."""
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    found = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr("relflat.estimate.coupling._RULES", {})
        fam = FAM(CE(), net := Mixed(mix), ["a", "b"], strength=1.0, curvature=curvature, seed=0)
        fam(net(x), y)
        found.append({key[0]: value for key, value in fam._estimator.memory.coupled.items() if key[0] in "ab"})
    assert found == [{"a": coupled, "b": False}] * 2


def test_that_is_looked_into_again_when_operations_change() -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    net = Mixed(torch.relu)
    fam = FAM(CE(), net, "a", strength=1.0, seed=0)
    for mix in (torch.relu, lambda h: h - h.mean(0), torch.relu):
        net.mix = mix
        fam(net(x), y)
    assert [v for k, v in fam._estimator.memory.coupled.items() if k[0] == "a"] == [False, True]


ORDERED = torch.arange(4)
MIXED = torch.tensor([2, 0, 3, 1])
REORDER: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "indexed": (lambda x: x[MIXED], True),
    "indexed in order": (lambda x: x[ORDERED], False),
    "indexed by a table": (lambda x: x[torch.stack([ORDERED, ORDERED])], True),
    "features indexed": (lambda x: x[:, MIXED[:3]], False),
    "selected": (lambda x: x.index_select(0, MIXED), True),
    "features selected": (lambda x: x.index_select(1, MIXED[:2]), False),
    "flipped": (lambda x: x.flip(0), True),
    "features flipped": (lambda x: x.flip(1), False),
    "both flipped": (lambda x: x.flip(1, 0), True),
    "rolled": (lambda x: x.roll(1, 0), True),
    "rolled as one": (lambda x: x.roll(1), True),
    "features rolled": (lambda x: x.roll(1, 1), False),
    "sorted": (lambda x: x.sort(0).values, True),
    "features sorted": (lambda x: x.sort(1).values, False),
    "gathered": (lambda x: x.gather(0, MIXED[:, None].expand(4, 5)), True),
    "features gathered": (lambda x: x.gather(1, MIXED[:, None].expand(4, 5)), False),
    "largest": (lambda x: x.topk(2, 0).values, True),
    "computed": (lambda x: x.exp(), False),
    "taken": (lambda x: x.take(MIXED), True),
    "scattered": (lambda x: torch.zeros(4, 5).index_put((MIXED,), x), True),
    "summed": (lambda x: x.sum(0), False),
}


@pytest.mark.parametrize("name", REORDER)
def test_operations_that_may_reorder_samples(name: str) -> None:
    operation, may = REORDER[name]
    assert may_reorder(operation(torch.randn(4, 5, requires_grad=True)).grad_fn) == may


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 17])
def test_any_two_samples_are_told_apart_by_a_split(n: int) -> None:
    call: Any = SimpleNamespace(samples=n, output=torch.zeros(n, 2))
    splits = [split.tolist() for split in _splits(call, Rng(0, 0), False)]
    assert len(splits) == (n - 1).bit_length()
    assert all(any(s[a] != s[b] for s in splits) for a, b in combinations(range(n), 2))
    (half,) = _splits(call, Rng(0, 0), True)
    assert half.shape == (n,)
    assert half[0] != half[-1]
    if n > 9:
        assert 1 < int(half.sum()) < n - 1


class Branches(nn.Module):
    """Two convolutions side by side, a gate, and attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.q = nn.Conv1d(4, 6, 1), nn.Conv1d(4, 6, 3, padding=1), nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.one(x), self.two(x).sigmoid() * self.one(x)], 1).mT
        return self.out((torch.bmm(self.q(h), h.mT).softmax(-1).bmm(h) + h).mean(1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Linear(8, 6), nn.Flatten(), nn.LazyLinear(3))


def convolutions() -> nn.Module:
    parts = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.GELU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*parts, nn.Flatten(), nn.Dropout(0.2), nn.LayerNorm(24), nn.Linear(24, 3))


class Indexed(nn.Module):
    """Rows of features by indices, in one dimension and in two next to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Conv2d(2, 4, 1), nn.Linear(6, 3)
        self.rows, self.columns = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.out(
            torch.cat([h[:, 1:3, self.rows, self.columns].flatten(1)], 1) + h[:, 2, self.rows].flatten(1)[:, :6]
        )


def instances() -> nn.Module:
    parts = nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, affine=True), nn.ReLU(), nn.Conv1d(6, 2, 3), nn.Flatten()
    return nn.Sequential(*parts, nn.Linear(10, 3))


KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "branches": (Branches, (5, 4, 7)),
    "indexed": (Indexed, (5, 2, 3, 3)),
    "instance normalisation": (instances, (5, 4, 9)),
    "encoder": (encoder, (5, 4, 8)),
    "convolutions": (convolutions, (5, 3, 8, 8)),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which derivatives were asked whether samples are coupled: each question costs a backward pass."""
    asked: list[str] = []
    for question in ("coupled_in_outputs", "coupled_in_products"):
        monkeypatch.setattr(f"relflat.estimate.subject.{question}", lambda *a, q=question, **k: asked.append(q) or {})
    return asked


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", KNOWN)
def test_stock_operations_are_known_to_leave_samples_apart(name: str, curvature: str, asked: list[str]) -> None:
    make, shape = KNOWN[name]
    net, x, y = make(), torch.randn(shape), torch.randint(3, shape[:1])
    net(x)
    with FAM(CE(), net, "*", strength=1.0, curvature=curvature) as fam:
        fam(net(x), y)
    assert asked == []
    assert set(fam._estimator.memory.coupled.values()) == {False}


def summed(z: Tensor, y: Tensor) -> Tensor:
    return (z.softmax(1) ** 2 - z).sum()


LINEAR_IN_A_SUM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divided": lambda z, y: summed(z, y) / len(y),
    "times": lambda z, y: 3 * summed(z, y),
    "less": lambda z, y: -(1 - summed(z, y)),
    "two": lambda z, y: summed(z, y) + nn.functional.mse_loss(z, z.detach() + 1),
    "mean": lambda z, y: z.exp().mean() + z.tanh().mean(1).sum(),
}
BENT_AFTER_A_SUM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one over": lambda z, y: 1 / summed(z, y),
    "squared": lambda z, y: summed(z, y) ** 2,
    "root": lambda z, y: (1 + summed(z, y).square()).sqrt(),
    "product": lambda z, y: summed(z, y) * summed(z.flip(1), y),
    "quotient": lambda z, y: summed(z, y) / summed(z.flip(1), y),
}


@pytest.mark.parametrize("name", LINEAR_IN_A_SUM)
def test_what_is_linear_in_a_sum_over_samples_leaves_them_apart(name: str, asked: list[str]) -> None:
    x, y = data()
    with FAM(LINEAR_IN_A_SUM[name], net := mlp(), "0", strength=1.0, curvature="hessian") as fam:
        fam(net(x), y)
    assert asked == []
    assert set(fam._estimator.memory.coupled.values()) == {False}


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("name", BENT_AFTER_A_SUM)
def test_what_bends_a_sum_over_samples_couples_them(name: str) -> None:
    x, y = data()
    with FAM(BENT_AFTER_A_SUM[name], net := mlp(), "0", strength=1.0, curvature="hessian") as fam:
        fam(net(x), y)
    assert set(fam._estimator.memory.coupled.values()) == {True}


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("seen", ["by the first", "by the second", "by none"])
def test_two_samples_of_which_one_sees_the_other(seen: str, curvature: str) -> None:
    mixes = {"by the first": lambda h: h.flip(0).cumsum(0).flip(0), "by the second": lambda h: h.cumsum(0)}
    net = Mixed(mixes.get(seen, lambda h: h[torch.arange(2)]))
    with FAM(CE(), net, ["a"], strength=1.0, curvature=curvature) as fam:
        fam(net(torch.randn(2, 4)), torch.tensor([0, 2]))
    assert list(fam._estimator.memory.coupled.values()) == [seen != "by none"]


class Skipping(nn.Module):
    """Blocks of one form, of which one rests in each step (LayerDrop)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.BatchNorm1d(4), "fc": nn.Linear(4, 4)}) for _ in range(3)
        )
        self.head, self.rests = nn.Linear(4, 3), 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, block in enumerate(self.blocks):
            x = x if k == self.rests else x + block["fc"](block["norm"](x).tanh())
        return self.head(x)


class Frozen(nn.Module):
    """Normalised over the batch or not, by no module's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.rests = nn.Linear(4, 4), nn.Linear(4, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        return self.head(nn.functional.batch_norm(self.fc(x), mean, var, training=self.rests == 1).tanh())


class Shifted(nn.Module):
    """Adds to each row the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x).tanh()
        return self.head((h + nn.functional.pad(h, (0, 0, 1, -1))).tanh())


class Turned(nn.Module):
    """As many positions as samples: a layer after the turn has its samples where the first has its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.q, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x.unsqueeze(-1) * torch.arange(1.0, 5).double()).tanh()
        return self.head(self.q(h.transpose(0, 1)).softmax(1).tanh()).transpose(0, 1).flatten(0, 1)


class Viewed(nn.Module):
    """The same operations on one shape in each pass and another in the next: samples are first, then second."""

    rests = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x).view((4, 1, 4) if self.rests else (1, 4, 4)).softmax(1).tanh()
        return self.head(h.view(4, 4))


def by_differences(net: nn.Module, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, curvature: str) -> float:
    """Kappa by its definition, ``sum_t sum_ab <w_a, w_b> d2 L / dW_at dW_bt``: differences of the loss, no autograd.

    For the Gauss-Newton matrix those of the loss of outputs that change as their own differences say.
    """
    h, total, kept = 1e-3, 0.0, weight.detach().clone()
    roots = torch.linalg.eigh(kept @ kept.T)
    middle = net(x)
    for t in range(weight.shape[1]):
        for value, vector in zip(roots.eigenvalues, roots.eigenvectors.T, strict=True):
            sides = []
            for step in (h, -h):
                weight.data[:, t] += step * vector
                sides.append(net(x))
                weight.data.copy_(kept)
            if curvature == "ggn":
                change = (sides[0] - sides[1]) / 2
                sides = [middle + change, middle - change]
            up, here, down = (float(nn.functional.cross_entropy(z, y)) for z in (sides[0], middle, sides[1]))
            total += float(value) * (up - 2 * here + down) / h**2
    return total


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("make", "layer", "at"),
    [
        (Skipping, "blocks.1.fc", [2, 0]),
        (Frozen, "fc", [0, 1]),
        (Shifted, "fc", [0]),
        (Turned, ["fc", "q"], [0]),
        (Viewed, "fc", [0, 1]),
        (Viewed, "fc", [1, 0]),
    ],
)
def test_where_samples_meet_is_not_taken_from_another_graph_or_dimension(make, layer, at, curvature) -> None:
    torch.manual_seed(0)
    net = make().double().train()
    x = torch.randn(4, 4).double()
    y = torch.randint(3, (len(net(x)),))
    fam = FAM(nn.CrossEntropyLoss(), net, layer, strength=1.0, curvature=curvature, method="exact")
    for net.rests in at:
        fam(net(x), y)
    first = layer if isinstance(layer, str) else layer[0]
    with torch.no_grad():
        want = by_differences(net, net.get_submodule(first).weight, x, y, curvature)
    assert fam.last["by_layer"][first] == pytest.approx(want, rel=1e-4, abs=1e-5)
