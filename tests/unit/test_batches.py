"""What a batch may be, that ``forward=`` holds in every pass, and how losses of batches make up that of the data."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from device import DEVICE
from relflat import (
    DataError,
    LossError,
    feature_robustness,
    max_eigenvalue_flatness,
    per_sample_flatness,
    relative_flatness,
    representativeness,
)
from relflat.measure.batches import moved

CE = nn.CrossEntropyLoss()


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def net(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


# -- forms ---------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    name: str = "a record"


class Graphs:
    """A batch that moves itself, as PyG's do: in place."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any) -> "Graphs":
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


def attributes(model: nn.Module, b: Any) -> tuple[Any, Any]:
    return model(b.x), b.y


def items(model: nn.Module, b: Any) -> tuple[Any, Any]:
    return model(b["x"]), b.pop("y")  # taken out of the batch, as some frameworks do


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "named tuple": (Pair, None),
    "named tuple, forward": (Pair, attributes),
    "frozen dataclass": (Record, attributes),
    "moves itself": (Graphs, attributes),
    "dict, popped": (lambda x, y: {"x": x, "y": y}, items),
    "UserDict, popped": (lambda x, y: UserDict(x=x, y=y), items),
    "UserDict with labels": (lambda x, y: UserDict(input=x, labels=y), None),
    "list": (lambda x, y: [x, y], None),
    "nested": (lambda x, y: {"in": [{"x": (x, "text")}], "y": y}, lambda m, b: (m(b["in"][0]["x"][0]), b["y"])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_batch_of_any_form_gives_the_same_number_and_stays_as_it_is(form: str, method: str) -> None:
    (x, y), model, (make, forward) = data(), net(), FORMS[form]
    batches = [make(x[:5], y[:5]), make(x[5:], y[5:])]
    want = relative_flatness(model, CE, (x, y), layer="0", method=method, curvature="hessian")
    for _ in range(2):
        found = relative_flatness(model, CE, batches, layer="0", method=method, forward=forward)
        assert found.samples == want.samples == 12
        assert found.value == pytest.approx(want.value, rel=1e-9 if method == "exact" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_any_form_are_moved_in_a_copy(form: str) -> None:
    (x, y), (make, _) = data(), FORMS[form]
    batch = make(x, y)
    there = moved(batch, "meta")
    assert type(there) is type(batch)
    pick = {"list": lambda b: b[0], "nested": lambda b: b["in"][0]["x"][0]}.get(
        form, lambda b: b.x if hasattr(b, "x") else next(iter(b.values()))
    )
    assert (pick(batch).device.type, pick(there).device.type) == (DEVICE.type, "meta")
    assert pick(there).dtype == torch.float64


def test_packed_sequences_move() -> None:
    packed = moved(pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), "meta")
    assert isinstance(packed, PackedSequence)
    assert packed.data.is_meta


@pytest.mark.parametrize(
    "wrong", [(np.ones((3, 4)), np.ones(3)), ([[1.0] * 4], [0]), Record(*data()), Graphs(*data()), [Record(*data())]]
)
def test_what_cannot_be_given_to_a_model_is_refused_with_the_way_out(wrong: Any) -> None:
    with pytest.raises(DataError, match="forward="):
        relative_flatness(net(), CE, wrong, layer="0")


class TakesADict(nn.Module):
    """A network whose one argument is a mapping, or a list."""

    def __init__(self) -> None:
        super().__init__()
        self.m = net()

    def forward(self, batch: Any) -> Tensor:
        return self.m(batch["x"] if isinstance(batch, dict) else batch[0] + batch[1])


@pytest.mark.parametrize("inputs", [lambda x: {"x": x}, lambda x: [x / 2, x / 2]])
def test_a_collection_is_one_argument_where_the_forward_pass_takes_one(inputs: Callable[[Tensor], Any]) -> None:
    x, y = data()
    found = relative_flatness(TakesADict(), CE, (inputs(x), y), layer="m.0", method="exact").value
    assert found == pytest.approx(relative_flatness(net(), CE, (x, y), layer="0", method="exact").value, rel=1e-9)


# -- forward= ------------------------------------------------------------------------------------------------


class Within(nn.Module):
    """The same as ``part`` on the outside, with it inside the network."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.m, self.part = net(), part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.m(x))


PARTS = {"temperature": lambda z: 3 * z, "slice": lambda z: z[:7], "roll": lambda z: z.roll(1, 1) - z.mean(1, True)}
MEASURES: dict[str, Callable[..., Any]] = {
    "finite_difference": lambda m, d, **k: relative_flatness(m, CE, d, method="finite_difference", probes=4, **k),
    "feature_robustness": lambda m, d, **k: feature_robustness(m, CE, d, radius=0.3, **k),
    "representativeness": lambda m, d, **k: representativeness(m, CE, d, d, bandwidth=0.2, **k),
    "max_eigenvalue": lambda m, d, **k: max_eigenvalue_flatness(m, CE, d, **k),
    "probe": lambda m, d, **k: relative_flatness(m, CE, d, method="probe", **k),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("measure", MEASURES)
def test_what_forward_computes_is_computed_in_every_pass(measure: str, part: str) -> None:
    (x, y), run = data(), PARTS[part]
    cut = len(run(torch.zeros(12, 3)))
    outside = MEASURES[measure](net(), [(x, y)], layer="0", forward=lambda m, b: (run(m(b[0])), b[1][:cut]))
    inside = MEASURES[measure](Within(run), [(x, y)], layer="m.0", forward=lambda m, b: (m(b[0]), b[1][:cut]))
    assert outside.value == pytest.approx(inside.value, rel=1e-6)
    plain = MEASURES[measure](net(), [(x, y)], layer="0")
    assert outside.value != pytest.approx(plain.value, rel=1e-3)


def test_several_passes_in_forward_are_repeated_together() -> None:
    x, y = data()
    twice = lambda m, b: (m(b[0]) + m(b[0].flip(1)), b[1])
    found = relative_flatness(net(), CE, (x, y), layer="0", forward=twice, method="finite_difference", probes=100)
    assert abs(found.value - relative_flatness(net(), CE, (x, y), layer="0", forward=twice, method="exact").value) < (
        4 * found.stderr
    )


# -- reductions ----------------------------------------------------------------------------------------------


def _squares(z: Tensor, t: Tensor) -> Tensor:
    """A squared hinge: 0 where the target's sign is met."""
    return (1 - (2.0 * (t > 0) - 1) * z[:, 0]).relu().square()


def _masked(z: Tensor, t: Tensor) -> Tensor:
    return z[:, 0][t > 0].square().mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sum": lambda z, t: _squares(z, t).sum(),
    "mean": lambda z, t: _squares(z, t).mean(),
    "cross-entropy, summed": lambda z, t: nn.functional.cross_entropy(z, t, reduction="sum"),
    "integer targets": lambda z, t: (z - t.to(torch.uint8)[:, None]).square().sum(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("order", ["easy first", "hard first", "as it is"])
def test_an_unknown_loss_of_batches_is_that_of_all_the_data(name: str, order: str) -> None:
    (x, _), model, loss = data(24), net(), LOSSES[name]
    with torch.no_grad():
        model[2].weight *= 30
    t = (model(x)[:, 0] > 0).long()
    t[:5] = 1 - t[:5]
    x, t = (x, t) if order == "hard first" else (x.flip(0), t.flip(0)) if order == "easy first" else (x[::5], t[::5])
    for size in (1, 3, 4):
        batches = list(zip(x.split(size), t.split(size), strict=True))
        found = relative_flatness(model, loss, batches, layer="0", method="exact").value
        assert found == pytest.approx(
            relative_flatness(model, loss, (x, t), layer="0", method="exact").value, rel=1e-8
        )


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (_masked, "neither the mean nor the sum"),
        (lambda z, t: 0 * z.square().sum(), "cannot be told"),
        (lambda z, t: z.square().sum() / len(z) ** 0.5, "neither the mean nor the sum"),
    ],
)
def test_a_loss_that_is_neither_or_never_tells_is_refused(loss: Callable[..., Tensor], says: str) -> None:
    x, _ = data()
    t = torch.tensor([1, 1, 1, 0] * 2 + [1, 0, 0, 0])  # equally many in the first two batches, and fewer in the third
    batches = list(zip(x.split(4), t.split(4), strict=True))
    with pytest.raises(LossError, match=f"{says}.*one batch"):
        relative_flatness(net(), loss, batches, layer="0", method="exact")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("measure", [relative_flatness, per_sample_flatness, max_eigenvalue_flatness])
def test_data_without_samples_are_refused_and_empty_batches_left_out(measure: Any, reduction: str) -> None:
    (x, y), loss = data(), nn.CrossEntropyLoss(reduction=reduction)
    for nothing in ([], iter([]), (x[:0], y[:0]), [(x[:0], y[:0])] * 2):
        with pytest.raises(DataError, match=r"empty|iterator"):
            measure(net(), loss, nothing, layer="0")
    with pytest.raises(DataError, match="every one is ignored"):
        measure(net(), nn.CrossEntropyLoss(), (x, torch.full_like(y, -100)), layer="0")
    if measure is relative_flatness:
        found = relative_flatness(net(), loss, [(x[:0], y[:0]), (x, y)], layer="0", method="exact").value
        assert found == pytest.approx(relative_flatness(net(), loss, (x, y), layer="0", method="exact").value)
