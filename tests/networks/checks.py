"""What is asked of every network: value, probes and gradients against Definition 3; nothing disturbed."""

import math
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import pytest
import torch
from architectures import Architecture, Family
from dense import Dense
from torch import Tensor, nn

from relflat import relative_flatness
from unbounded import FAM

VALUE, GRADIENT = 1e-9, 1e-7


@dataclass
class Stage:
    """A model with data, its dense twin, and a forward pass that always meets the same state."""

    case: Architecture
    layer: str
    train: bool = True
    model: nn.Module = field(init=False)
    x: Any = field(init=False)
    y: Any = field(init=False)
    dense: Dense = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(1)
        self.x, self.y = case.x(), case.y()
        if case.dtype is not None and self.x.is_floating_point():
            self.x = self.x.to(case.dtype)
        self.model, twin = self.fresh(), self.fresh()
        self.buffers = [b.clone() for b in self.model.buffers()]
        for part in twin.modules():
            if isinstance(part, nn.Embedding):
                part.sparse = False
        self.dense = Dense(twin, self.layer, self.run, None if case.weight is None else case.weight(twin))

    def fresh(self) -> nn.Module:
        torch.manual_seed(2)
        model = self.case.build().train(self.train)
        return model if self.case.dtype is None else model.to(self.case.dtype)

    def run(self, model: Any) -> Any:
        torch.manual_seed(7)
        return self.case.call(model, self.x)

    def forward(self) -> Any:
        for b, start in zip(self.model.buffers(), self.buffers, strict=True):
            b.copy_(start)
        return self.run(self.model)

    def loss(self, outputs: Any) -> Tensor:
        return self.case.loss(outputs, self.y)

    def close_to(self, want: float, tolerance: float) -> Any:
        tolerance = max(tolerance, self.case.precision)
        return pytest.approx(want, rel=0, abs=tolerance * max(1.0, abs(want)))

    def fam(self, **options: Any) -> FAM:
        return FAM(self.case.loss, self.model, self.layer, strength=1.0, **options)


@pytest.mark.filterwarnings("ignore:kappa of layer")
class EachArchitecture:
    """The tests of one family; a subclass names it.

    Attributes:
        family: the architectures to test, each at each of its layers.
    """

    family: Family

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"case", "layer"} <= set(metafunc.fixturenames):
            pairs = [
                pytest.param(a, layer, id=f"{a.name}-{layer}") for a in self.family.members for layer in a.layers
            ]
            metafunc.parametrize(("case", "layer"), pairs)

    def test_value_and_gradients(self, case: Architecture, layer: str) -> None:
        stage = Stage(case, layer)
        want = stage.dense.kappa(stage.loss)
        gradients = stage.dense.gradients(want)
        with stage.fam(curvature="hessian", method="exact") as fam:
            outputs = stage.forward()
            total = fam(outputs, stage.y)
            got = torch.autograd.grad(
                total - stage.loss(outputs),
                [p for p in stage.model.parameters() if p.requires_grad],
                materialize_grads=True,
            )
        assert fam.last["kappa"] == stage.close_to(want.item(), VALUE)
        for a, (name, b) in zip(got, gradients.items(), strict=True):
            error = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
            assert error <= max(GRADIENT, case.precision), name

    @pytest.mark.slow
    def test_probes_have_kappa_for_their_mean(self, case: Architecture, layer: str) -> None:
        """Of the Hessian at one layer, of the Gauss-Newton matrix at the next: the products are those of exact."""
        ggn = has_one_tensor(case, layer) and (self.family.members.index(case) + case.layers.index(layer)) % 2
        stage = Stage(case, layer)
        want = (stage.dense.kappa_ggn if ggn else stage.dense.kappa)(stage.loss).item()
        with stage.fam(curvature="ggn" if ggn else "hessian", method="probe", probes=4, seed=0) as fam:
            within_four_standard_errors(stage, fam, want)

    @pytest.mark.slow
    def test_gauss_newton(self, case: Architecture, layer: str) -> None:
        if not has_one_tensor(case, layer):
            pytest.skip("no single tensor of outputs")
        stage = Stage(case, layer)
        want = stage.dense.kappa_ggn(stage.loss).item()
        with stage.fam(method="exact") as fam:
            fam(stage.forward(), stage.y)
        assert fam.last["kappa"] == stage.close_to(want, VALUE)

    def test_measured_in_evaluation_mode(self, case: Architecture, layer: str) -> None:
        stage = Stage(case, layer, train=False)
        want = stage.dense.kappa(stage.loss).item()
        stage.forward()
        before = snapshot(stage.model)
        options: dict[str, Any] = {
            "layer": layer,
            "forward": lambda model, batch: (case.call(model, stage.x), batch[1]),
        }
        for method in ("exact", "auto"):
            flat = relative_flatness(stage.model, case.loss, (stage.y, stage.y), method=method, probes=200, **options)
            if flat.method.startswith(("exact", "closed_form")):
                assert flat.value == stage.close_to(want, VALUE)
            else:
                assert abs(flat.value - want) <= 4 * flat.stderr
        assert_equal(snapshot(stage.model), before)

    def test_nothing_else_is_touched(self, case: Architecture, layer: str) -> None:
        """Modes, buffers, gradients, hooks and random numbers are those of a run without FAM."""
        stage, plain = Stage(case, layer), Stage(case, layer)
        for s in (stage, plain):
            for p in s.model.parameters():
                p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
        fam = stage.fam(curvature="hessian", method="probe")
        outputs, plain_outputs = stage.forward(), plain.forward()
        state = torch.get_rng_state()
        fam(outputs, stage.y)
        assert torch.equal(torch.get_rng_state(), state)
        assert_equal(tensors(outputs), tensors(plain_outputs))
        fam.close()
        assert_equal(snapshot(stage.model), snapshot(plain.model))


def has_one_tensor(case: Architecture, layer: str) -> bool:
    """Of outputs; others have no Gauss-Newton matrix."""
    stage = Stage(case, layer)
    return isinstance(stage.run(stage.dense.model), Tensor)


def within_four_standard_errors(stage: Stage, fam: FAM, want: float, repeats: int = 25) -> None:
    values = []
    for _ in range(repeats):
        fam(stage.forward(), stage.y)
        values.append(fam.last["kappa"])
    values = torch.tensor(values, dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(repeats)
    slack = max(VALUE, stage.case.precision) * max(1.0, abs(want))
    assert abs(float(values.mean()) - want) <= 4 * stderr + slack


def tensors(outputs: Any) -> dict[str, Any]:
    outputs = vars(outputs) if is_dataclass(outputs) else outputs
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return {str(i): t.detach() for i, t in enumerate(leaves) if isinstance(t, Tensor)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"rng": torch.get_rng_state()}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[f"{name} module"] = (module.training, hooks, sorted(module.__dict__), torch.is_grad_enabled())
    for name, p in model.named_parameters():
        found |= {name: p.detach().clone(), f"{name} grad": None if p.grad is None else p.grad.clone()}
    return found | {f"{name} buffer": b.clone() for name, b in model.named_buffers()}


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for key, a in one.items():
        b = two[key]
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key
