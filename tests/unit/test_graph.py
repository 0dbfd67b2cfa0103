"""What is read off autograd's graph and off what a model returned."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import data, mlp
from torch import Tensor, nn

from relflat.capture.graph import ancestors, follow, leaves_between, operation, same_memory, singular
from relflat.capture.outputs import output_tensor
from relflat.errors import SecondDerivativeError
from relflat.estimate.estimator import _remedy
from relflat.loss.reading import without_constants
from relflat.options import Options

SINGULAR: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    **{f"power {p}": (lambda x, p=p: x**p, p not in (1, 2, 3, 4)) for p in (-1, 0.5, 1, 1.5, 2, 2.5, 3, 4, 4.5, 5)},
    "powers": (lambda x: x ** torch.tensor([1.0, 2.0, 3.0]), True),
    "root": (torch.sqrt, True),
    "norm": (lambda x: torch.linalg.vector_norm(x), True),
    "deviation": (torch.std, True),
    "distance": (lambda x: torch.cdist(x[None], x[None]), True),
    "angle": (torch.asin, True),
    "exponential": (torch.exp, False),
    "variance": (torch.var, False),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_operations_whose_higher_derivatives_may_be_no_numbers(name: str) -> None:
    of, may = SINGULAR[name]
    x = torch.full((2, 3), 0.5, requires_grad=True)
    assert singular(of(x).grad_fn) == may


def test_parameters_between_a_layer_and_the_loss() -> None:
    net, (x, _) = mlp(nn.PReLU()).double(), data()
    hidden = net[0](x)
    loss = net[1:](hidden).square().mean() + net[0].bias.sum()
    found = leaves_between(loss.grad_fn, [hidden.grad_fn])
    assert {id(p) for p in found} == {id(p) for p in net[1:].parameters()}
    assert len(found) == 3
    assert hidden.grad_fn in set(ancestors(loss.grad_fn))
    assert hidden.grad_fn not in set(ancestors(loss.grad_fn, [hidden.grad_fn]))


def test_views_are_followed_to_what_computed() -> None:
    z = torch.randn(2, 3, requires_grad=True).exp()
    end = z.view(6)[None].reshape(3, 2)
    assert follow(end.grad_fn, ("View", "Unsqueeze", "UnsafeView", "ReshapeAlias")) is z.grad_fn
    assert operation(follow(end.grad_fn, ("View",))) == "Unsqueeze"
    assert follow(end.grad_fn, ("View", "Unsqueeze"), until=end.grad_fn) is end.grad_fn
    assert follow(None, ("View",)) is None


def test_same_numbers_in_the_same_order_of_memory() -> None:
    a = torch.randn(2, 3)
    same = {"itself": (a, a), "flat": (a, a.view(-1)), "turned alike": (a.T, a.T), "a row alone": (a[:1], a[0])}
    other = {
        "turned": (a, a.T), "a part": (a, a[:1]), "a later part": (a[0], a[1]), "a copy": (a, a.clone()),
        "bits": (a, a.view(torch.int32)), "empty": (a[:0], a[:0]), "turned and flat": (a.T, a.view(3, 2)),
    }  # fmt: skip
    assert {name: same_memory(*pair) for name, pair in (same | other).items()} == dict.fromkeys(same, True) | (
        dict.fromkeys(other, False)
    )
    empty = a[:0]
    assert same_memory(empty, empty)


CONSTANTS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "none": (lambda x: x, 1.0),
    "multiplied": (lambda x: 3 * x, 3.0),
    "divided": (lambda x: x / 4, 0.25),
    "by tensors": (lambda x: torch.tensor(6.0) * (x / torch.tensor(4.0)).clone(), 1.5),
    "from the right": (lambda x: (x * torch.tensor([5.0])).squeeze(), 5.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_read_off(name: str) -> None:
    of, factor = CONSTANTS[name]
    loss = torch.randn(3, requires_grad=True).exp().sum()
    assert without_constants(of(loss).grad_fn) == (loss.grad_fn, factor)
    assert without_constants((2 * of(loss)).grad_fn, until=[of(loss).grad_fn])[1] == 2 * factor


def test_what_is_no_constant_is_not_read() -> None:
    loss, weights = torch.randn(3, requires_grad=True).exp().sum(), torch.tensor([1.0, 2.0])
    parameter = torch.ones((), requires_grad=True)
    for made in (
        torch.tensor(2.0) / loss,
        loss * weights,
        weights / loss,
        loss * parameter,
        parameter / loss,
        loss * loss,
    ):
        assert without_constants(made.grad_fn)[0] is None
    whole = (loss + 1).grad_fn
    assert without_constants(whole) == (whole, 1.0)


def test_the_tensor_a_loss_is_computed_from() -> None:
    z, fixed = torch.randn(2, requires_grad=True).exp(), torch.ones(2)
    loss = z.sum()
    found: list[tuple[Any, Any]] = [
        (z, z),
        ({"logits": z, "hidden": z + 1}, z),
        (SimpleNamespace(logits=z), z),
        ([z, fixed], z),
        ([z, z + 1], None),
        ({"loss": loss, "ids": fixed}, loss),
        (fixed, fixed),
        ([fixed], None),
        ("nothing", None),
    ]
    for outputs, expected in found:
        assert output_tensor(outputs) is expected
    assert output_tensor({"loss": loss}, loss) is None
    assert output_tensor({"logits": z, "loss": loss}, loss) is z
    assert output_tensor("nothing", loss) is None


REMEDIES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"curvature": "hessian"}, {}, "an operation", "use a layer after that operation"),
    ({"curvature": "hessian"}, {}, "the loss", "use a layer after that operation"),
    ({"gradient": "frozen"}, {}, "the loss", "use a layer after that operation"),
    ({}, {}, "the loss", "use gradient='frozen'"),
    ({}, {"known": 1}, "an operation", "use gradient='frozen'"),
    ({"measuring": True}, {"known": 1}, "an operation", "use method='probe'"),
    ({"measuring": True, "curvature": "hessian"}, {"known": 1}, "an operation", "use a layer after that operation"),
    ({"measuring": True}, {"replay": 1}, "an operation", "use curvature='hessian' with method='finite_difference'"),
    (
        {"curvature": "hessian"},
        {"replay": 1},
        "compiled",
        "use compile what comes before the layer only, or curvature='hessian' with method='finite_difference', or "
        "radius=, which needs no derivative",
    ),
]


@pytest.mark.parametrize(("options", "scene", "text", "said"), REMEDIES)
def test_remedies_are_those_that_help(options, scene, text: str, said: str) -> None:
    found: Any = SimpleNamespace(**({"known": None, "replay": None} | scene))
    assert _remedy(found, Options(**options), str(SecondDerivativeError(text))) == said
