"""What a long run and a large layer meet: no leak, memory that grows with the batch, random numbers left alone."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relflat import relative_flatness
from unbounded import FAM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from counting import peak_bytes

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.slow
STEPS, BYTES_A_STEP = 200, 2048

WAYS: dict[str, dict[str, Any]] = {
    "closed form": {"layer": "4"},
    "ggn probes": {"layer": "2", "probes": 2},
    "hessian probes": {"layer": "2", "curvature": "hessian"},
    "exact": {"layer": "4", "method": "exact"},
    "frozen": {"layer": "2", "gradient": "frozen"},
    "weights": {"layer": "2", "gradient": "weights"},
    "adaptive, normalised": {"layer": "2", "adaptive": True, "normalize_features": True},
    "in weight": {"layer": "2.weight", "curvature": "hessian"},
    "several": {"layer": ["0", "2", "4"]},
    "finite differences": {"layer": "2", "curvature": "hessian", "method": "finite_difference"},
    "radius": {"layer": "2", "radius": 0.1},
    "radius, perturbed forward": {"layer": "2", "radius": 0.1, "strength": 1.0},
    "radius, head": {"layer": "4", "radius": 0.1},
}
LONG = ("closed form", "ggn probes", "in weight", "radius", "radius, perturbed forward")


def network(p: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Dropout(p), nn.Linear(5, 3))


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g)


def criterion(model: nn.Module, way: str) -> FAM:
    return FAM(CE, model, **{"strength": 0.01, "seed": 0} | WAYS[way])


class Mallinfo(ctypes.Structure):
    """What glibc has given away; the layout is that of its manual."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    ))  # fmt: skip


MALLINFO = getattr(ctypes.CDLL(None), "mallinfo2", None)


def live() -> tuple[int, int]:
    """Tensors, and bytes in use: to the byte, for resident pages would drown a few steps' worth."""
    gc.collect()
    tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # isinstance would wake lazy modules
    MALLINFO.restype = Mallinfo
    found = MALLINFO()
    return tensors, found.uordblks + found.hblkhd + 64 * sys.getallocatedblocks()  # Python's small objects are apart


def assert_flat(step: Callable[[], Any], steps: int) -> None:
    for _ in range(steps // 5):
        step()
    tensors, bytes_before = live()
    for _ in range(steps):
        step()
    tensors_after, bytes_after = live()
    assert tensors_after == tensors
    assert bytes_after - bytes_before < steps * BYTES_A_STEP


@pytest.mark.filterwarnings("ignore::relflat.RelflatWarning")
@pytest.mark.skipif(MALLINFO is None, reason="asks glibc, 2.33 or later")
class TestNothingLeaks:
    @pytest.mark.parametrize("way", LONG)
    def test_training(self, way: str) -> None:
        model, (x, y) = network(), data()
        fam, optimiser = criterion(model, way), torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            optimiser.zero_grad()
            fam(model(x), y).backward()
            optimiser.step()

        assert_flat(step, STEPS)

    def test_measuring(self) -> None:
        model, batch = network(), data()

        def measure() -> None:
            relative_flatness(model, CE, batch, layer="4")
            relative_flatness(model, CE, batch, layer="2", method="probe", probes=1)

        assert_flat(measure, STEPS)

    def test_building_and_closing(self) -> None:
        model, (x, y) = network(), data()

        def once() -> None:
            with criterion(model, "ggn probes") as fam:
                fam(model(x), y)

        assert_flat(once, STEPS)


@pytest.mark.filterwarnings("ignore::relflat.RelflatWarning")
class TestRandomNumbers:
    @pytest.mark.parametrize("way", WAYS)
    def test_the_stream_of_dropout_is_bitwise_the_same(self, way: str) -> None:
        x, y = data()
        masks = []
        for make in (lambda _: CE, lambda model: criterion(model, way)):
            model = network()
            seen: list[Tensor] = []
            model[3].register_forward_hook(lambda m, a, o, seen=seen: seen.append((o == 0).detach()))
            loss_fn = make(model)
            torch.manual_seed(5)
            for _ in range(4):
                forward = len(seen)
                outputs = model(x)
                del seen[forward + 1 :]
                loss_fn(outputs, y).backward()
                del seen[forward + 1 :]  # passes of FAM's own
            masks.append((torch.stack(seen), torch.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))

    @pytest.mark.parametrize("way", WAYS)
    def test_a_criterion_call_leaves_the_global_state(self, way: str) -> None:
        model, (x, y) = network(), data()
        fam = criterion(model, way)
        for _ in range(2):
            outputs = model(x)
            state = torch.get_rng_state()
            fam(outputs, y).backward()
            assert torch.equal(torch.get_rng_state(), state)


class Step:
    """One training step of a net with a wide layer in the middle."""

    def __init__(self, width: int, samples: int, options: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
        )
        self.loss_fn = CE if options is None else FAM(CE, self.model, strength=0.1, **options)
        self.x, self.y = torch.randn(samples, 16), torch.randint(4, (samples,))

    def step(self) -> None:
        self.model.zero_grad()
        self.loss_fn(self.model(self.x), self.y).backward()


def peak(width: int, samples: int, options: dict[str, Any] | None = None) -> int:
    return peak_bytes(lambda: Step(width, samples, options), warm_up=1)


@pytest.mark.filterwarnings("ignore::relflat.RelflatWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"curvature": "hessian"}, {"gradient": "frozen"}, {"radius": 0.1}],
    ids=["ggn", "hessian", "frozen", "radius"],
)
class TestMemory:
    def test_a_layer_of_4096_by_4096(self, options: dict[str, Any]) -> None:
        assert peak(4096, 32, {"layer": "2"} | options) < 3 * peak(4096, 32)

    def test_grows_linearly_in_the_batch(self, options: dict[str, Any]) -> None:
        one, two, three = (peak(64, n, {"layer": "2"} | options) for n in (1000, 2000, 3000))
        assert three - two == pytest.approx(two - one, rel=0.05)
