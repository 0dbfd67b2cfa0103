"""method="xtrace": exact where it can be, honest errors elsewhere, and what it refuses."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from relflat import (
    FAM,
    ConfigError,
    DataError,
    NonFiniteError,
    per_sample_flatness,
    reference,
    relative_flatness,
    relative_flatness_by_layer,
)
from relflat.measure import adaptive, sweep
from relflat.measure.xtrace import Coordinates, Sketch

CE = nn.CrossEntropyLoss


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 6), nn.Softplus(), nn.Linear(6, 3)).double()


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 20), nn.Softplus(), nn.Linear(20, 3)).double()


def cnn() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    ).double()


class Recurrent(nn.Module):
    """A layer that feeds itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.step(x).tanh()
        return self.head(x)


class Twins(nn.Module):
    """Two layers of equal weights, inputs and curvature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.head = nn.Linear(4, 9).double(), nn.Linear(9, 3).double()
        self.two = copy.deepcopy(self.one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(x).tanh() + self.two(x).tanh())


class Fresh:
    """Batches made anew for each sweep."""

    def __init__(self, make: Callable[[int], list]) -> None:
        self.make, self.sweeps = make, 0

    def __iter__(self) -> Iterator:
        self.sweeps += 1
        return iter(self.make(self.sweeps))


class UsedUp:
    """An iterable that gives the same iterator every time, so that it is empty from the second time on."""

    def __init__(self, batches: list) -> None:
        self.source = iter(batches)

    def __iter__(self) -> Iterator:
        return self.source


def bent(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A finite loss with a gradient, whose second derivative is not a number."""
    return CE()(z, y) + (z - z.detach()).abs().pow(1.5).sum()


def data(n: int = 12, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *(shape or (4,)), generator=g, dtype=torch.float64), torch.arange(n) % 3


def cut(x, y, sizes) -> list:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def truth(net: nn.Module, x, y, layer: str, form: str, curvature: str = "hessian") -> float:
    loss, W = reference.at_layer(net, CE(), x, y, layer)
    if curvature == "hessian":
        return float(getattr(reference, form)(loss, W))
    outputs, W = reference.outputs_at_layer(net, x, layer)
    return float(reference.kappa_ggn(outputs, lambda z: CE()(z, y), W))


class TestAgreesWithTheReference:
    @pytest.mark.parametrize(("layer", "size"), [("0", 16), ("2", 54), ("4", 18), ("2.weight", 54)])
    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_exact_from_as_many_products_as_dimensions(self, layer: str, size: int, curvature: str) -> None:
        """m * min(d, m) of them: layers that widen, that narrow, the output, a parameter."""
        net, (x, y) = mlp(), data()
        flat = relative_flatness(
            net, CE(), cut(x, y, [5, 7]), layer=layer, curvature=curvature, method="xtrace", probes=size
        )
        want = truth(net, x, y, layer, "kappa", curvature)
        assert flat.value == pytest.approx(want, rel=1e-9)
        assert (flat.method, flat.stderr) == ("exact", 0.0)

    def test_exact_for_the_adaptive_form_and_normalized_features(self) -> None:
        net, (x, y) = mlp(), data()
        options = {"layer": "2", "method": "xtrace", "probes": 54}
        flat = relative_flatness(net, CE(), (x, y), adaptive=True, **options)
        assert flat.value == pytest.approx(truth(net, x, y, "2", "kappa_adaptive"), rel=1e-9)
        flat = relative_flatness(net, CE(), cut(x, y, [5, 7]), normalize_features=True, **options)
        loss, W = reference.at_layer(net, CE(), x, y, "2")
        want = reference.kappa_normalized(loss, W, net[:2](x).detach().std(0, correction=0))
        assert flat.value == pytest.approx(float(want), rel=1e-9)

    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_convolutions(self, layer: str) -> None:
        net, (x, y) = cnn(), data(6, 2, 4, 4)
        for curvature in ("hessian", "ggn"):
            want = truth(net, x, y, layer, "kappa", curvature)
            options = {"layer": layer, "curvature": curvature, "method": "xtrace"}
            flat = relative_flatness(net, CE(), cut(x, y, [2, 4]), probes=200, **options)
            assert flat.value == pytest.approx(want, rel=1e-9)

    def test_a_layer_that_feeds_itself(self) -> None:
        net, (x, y) = Recurrent(), data()
        for curvature in ("hessian", "ggn"):
            options = {"layer": "step", "curvature": curvature, "method": "xtrace"}
            want = truth(net, x, y, "step", "kappa", curvature)
            assert relative_flatness(net, CE(), (x, y), probes=16, **options).value == pytest.approx(want)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 5.0, 0.2]).double()])
    def test_losses_add_up_over_batches(self, reduction: str, weight: torch.Tensor | None) -> None:
        net, (x, y) = mlp(), data()
        loss_fn = CE(reduction=reduction, weight=weight)
        options = {"layer": "2", "probes": 20, "method": "xtrace"}
        one = relative_flatness(net, loss_fn, (x, y), **options)
        several = relative_flatness(net, loss_fn, cut(x, y, [1, 4, 7]), **options)
        exact = relative_flatness(net, loss_fn, (x, y), layer="2", method="exact")
        assert several.value == pytest.approx(one.value, rel=1e-9)
        assert abs(one.value - exact.value) <= 4 * one.stderr
        for name in ("loss", "confidence", "weight_norm", "feature_norm2", "samples"):
            assert getattr(one, name) == pytest.approx(getattr(exact, name), rel=1e-12)
            assert getattr(several, name) == pytest.approx(getattr(exact, name), rel=1e-12)

    def test_float32(self) -> None:
        net, (x, y) = mlp().float(), data()
        want = truth(net, x, y, "2", "kappa")
        flat = relative_flatness(net, CE(), (x.float(), y), layer="2", method="xtrace", probes=54)
        assert flat.value == pytest.approx(want, rel=1e-4)


class TestError:
    @pytest.mark.slow
    def test_it_falls_faster_than_that_of_probes_and_is_of_the_size_reported(self) -> None:
        net, (x, y) = mlp(), data(40)
        exact = relative_flatness(net, CE(), (x, y), layer="2", curvature="ggn", method="exact").value
        off: dict[str, float] = {}
        for method in ("probe", "xtrace"):
            options = {"curvature": "ggn", "method": method, "probes": 32, "layer": "2"}
            flats = [relative_flatness(net, CE(), (x, y), seed=seed, **options) for seed in range(40)]
            off[method] = math.sqrt(sum((f.value - exact) ** 2 for f in flats) / 40)
            reported = math.sqrt(sum(f.stderr**2 for f in flats) / 40)
            assert 0.5 < off[method] / reported < 2
        assert off["xtrace"] < 0.2 * off["probe"]

    @pytest.mark.slow
    def test_unbiased_with_few_products_and_honest_on_average(self) -> None:
        net, (x, y) = mlp(), data(40)
        exact = relative_flatness(net, CE(), (x, y), layer="2", method="exact").value
        z, off = [], []
        for seed in range(200):
            flat = relative_flatness(net, CE(), (x, y), layer="2", method="xtrace", probes=8, seed=seed)
            off.append(flat.value - exact)
            z.append(off[-1] / flat.stderr)
        off = torch.tensor(off)
        assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(200)
        assert float((torch.tensor(z).abs() > 4).double().mean()) < 0.01  # of four numbers: Student's tail is long
        assert float(torch.tensor(z).abs().median()) > 0.05

    def test_repeatable_from_the_seed(self) -> None:
        net, (x, y) = mlp(), data()
        options = {"layer": "2", "method": "xtrace", "probes": 10}
        first = relative_flatness(net, CE(), (x, y), seed=3, **options)
        torch.manual_seed(99)
        assert relative_flatness(net, CE(), (x, y), seed=3, **options).value == first.value
        assert relative_flatness(net, CE(), (x, y), seed=4, **options).value != first.value
        assert first.method == "xtrace(hessian, 10)"
        assert math.isnan(first.trace)

    def test_rtol_doubles_the_products_of_the_layers_that_need_it(self) -> None:
        net, (x, y) = wide(), data(40)
        found = relative_flatness_by_layer(
            net, CE(), cut(x, y, [20, 20]), layer="*", curvature="ggn", method="xtrace", probes=16, rtol=1e-3
        )
        for name, flat in found.items():
            want = truth(net, x, y, name, "kappa", "ggn")
            assert flat.stderr <= 1e-3 * flat.value
            assert abs(flat.value - want) <= 4 * flat.stderr + 1e-9 * want
        assert (found["0"].method, found["2"].method) == ("exact", "xtrace(ggn, 64)")
        flat = relative_flatness(net, CE(), (x, y), layer="2", method="xtrace", probes=4, rtol=1e-12)
        assert flat.method == "exact"

    @pytest.mark.slow
    def test_rtol_starts_from_products_enough_to_tell_the_error(self) -> None:
        net, (x, y) = wide(), data(40)
        options = {"layer": "2", "curvature": "ggn", "method": "xtrace"}
        assert relative_flatness(net, CE(), (x, y), probes=4, rtol=9.0, **options).method == "xtrace(ggn, 32)"
        assert relative_flatness(net, CE(), (x, y), probes=4, **options).method == "xtrace(ggn, 4)"
        exact = relative_flatness(net, CE(), (x, y), layer="2", curvature="ggn", method="exact").value
        off = [
            abs(relative_flatness(net, CE(), (x, y), probes=4, rtol=0.02, seed=seed, **options).value / exact - 1)
            for seed in range(60)
        ]
        assert sum(o > 2 * 0.02 for o in off) <= 1

    def test_layers_draw_directions_of_their_own(self) -> None:
        net, (x, y) = Twins(), data(40)
        options = {"layer": ["one", "two"], "curvature": "ggn"}
        exact = relative_flatness_by_layer(net, CE(), (x, y), method="exact", **options)
        assert exact["one"].value == pytest.approx(exact["two"].value, rel=1e-12)
        off: dict[str, list[float]] = {"one": [], "two": []}
        for seed in range(30):
            found = relative_flatness_by_layer(net, CE(), (x, y), method="xtrace", probes=8, seed=seed, **options)
            for name, flat in found.items():
                off[name].append(flat.value - exact[name].value)
        assert abs(float(torch.corrcoef(torch.tensor([off["one"], off["two"]]))[0, 1])) < 0.5

    def test_a_sketch_keeps_three_columns_for_two_products(self) -> None:
        torch.manual_seed(0)
        factor = torch.randn(40, 20, dtype=torch.float64)
        coordinates = Coordinates(torch.randn(5, 8, dtype=torch.float64), adaptive=False)
        for products in (8, 16):
            sketch = Sketch(coordinates, 0, products)
            while sketch.pending is not None:
                sketch.receive(factor @ (factor.mT @ sketch.pending))
                kept = [v for v in vars(sketch).values() if isinstance(v, torch.Tensor) and v.shape[0] == 40]
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
                assert sum(storages.values()) <= 12 * 40 * products

    def test_weights_travel_between_ranks_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sent = []

        def gathered(make: Callable, group: object) -> list:
            sums = make()
            sent.append([name for name, x in sums.layers.items() if x.coordinates is not None])
            return [sums]

        monkeypatch.setattr(sweep, "gathered", gathered)
        relative_flatness(mlp(), CE(), data(), layer="2", method="xtrace", probes=8)
        assert sent == [["2"], []]

    def test_the_estimate_of_a_sketch_is_right(self) -> None:
        """Any symmetric matrix: of low rank it is exact from a few products, of rank 0 too."""
        torch.manual_seed(0)
        coordinates = Coordinates(torch.randn(5, 8, dtype=torch.float64), adaptive=False)
        for rank in (0, 3, 40):
            factor = torch.randn(40, rank, dtype=torch.float64)
            signs = torch.ones(rank, dtype=torch.float64)
            signs[::3] = -1.0
            A = (factor * signs) @ factor.mT
            values = []
            for products in (8, 16, 30, 40):
                sketch = Sketch(coordinates, 0, products)
                asked = []
                while sketch.pending is not None:
                    asked.append(sketch.pending)
                    sketch.receive(A @ sketch.pending)
                values.append(sketch.value)
                error = abs(sketch.value - float(A.trace()))
                assert error <= 4 * math.sqrt(sketch.variance) + 1e-9 * float(A.abs().sum())
                torch.testing.assert_close(asked[-1].mT @ asked[-1], torch.eye(asked[-1].shape[1]).double())
            assert sketch.exact
            if rank <= 3:
                assert values == pytest.approx([float(A.trace())] * 4, rel=1e-9, abs=1e-12)

    def test_coordinates_carry_the_gram_matrix_of_the_weight(self) -> None:
        for d, m in ((3, 5), (5, 3)):
            W = torch.randn(d, m, dtype=torch.float64)
            space = Coordinates(W, adaptive=False)
            torch.testing.assert_close(space.factor @ space.factor.mT, W @ W.mT)
            assert space.size == (9 if d > m else 15)
            for form in (space, Coordinates(W, adaptive=True)):
                x, g = torch.randn(form.size, dtype=torch.float64), torch.randn(d, m, dtype=torch.float64)
                assert float((form.change(x) * g).sum()) == pytest.approx(float(x @ form.seen(g)))


class TestRefuses:
    @pytest.mark.parametrize("probes", [1, 2, 7])
    def test_products_without_pairs(self, probes: int) -> None:
        with pytest.raises(ConfigError, match=rf"probes={probes}.*even number"):
            relative_flatness(mlp(), CE(), data(), layer="2", method="xtrace", probes=probes)

    def test_training_and_single_samples(self) -> None:
        with pytest.raises(ConfigError, match=r"'xtrace'.*no gradient.*relative_flatness"):
            FAM(CE(), mlp(), "2", strength=1.0, method="xtrace")
        for method in ("xtrace", "finite_difference"):
            with pytest.raises(ConfigError, match=rf"{method}.*all samples together.*'probe'"):
                per_sample_flatness(mlp(), CE(), data(), layer="2", method=method)

    def test_data_that_can_be_read_once(self) -> None:
        with pytest.raises(DataError, match="xtrace' goes over the data more than once"):
            relative_flatness(mlp(), CE(), iter([data()]), layer="2", method="xtrace")
        with pytest.raises(DataError, match="empty"):
            relative_flatness(mlp(), CE(), [], layer="2", method="xtrace")

    def test_products_of_the_user_in_its_message(self) -> None:
        with pytest.raises(ConfigError, match=r"probes=1:"):
            relative_flatness(mlp(), CE(), data(), layer="2", method="xtrace", probes=1, rtol=0.1)

    @pytest.mark.parametrize("options", [{"method": "xtrace"}, {"method": "probe", "rtol": 0.05}])
    def test_data_that_are_used_up(self, options: dict) -> None:
        """They hung for ever, and ended in a KeyError."""
        x, y = data()
        with pytest.raises(DataError, match=r"12 samples.*then 0.*DataLoader or a list"):
            relative_flatness(mlp(), CE(), UsedUp(cut(x, y, [6, 6])), layer="2", **options)

    def test_a_layer_that_takes_part_in_one_sweep_only(self) -> None:
        """Its output is 0, so that the loss does not tell."""

        class Sometimes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a, self.b, self.runs = nn.Linear(4, 3).double(), nn.Linear(4, 3, bias=False).double(), 0
                nn.init.zeros_(self.b.weight)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.runs += 1
                return self.a(x).tanh() + (self.b(x).tanh() if self.runs == 1 else 0.0)

        options = {"layer": ["a", "b"], "curvature": "ggn", "method": "xtrace", "probes": 4}
        with pytest.raises(DataError, match="layer 'b' took part in one sweep"):
            relative_flatness_by_layer(Sometimes(), CE(), data(), **options)

    def test_a_curvature_that_is_not_a_number(self) -> None:
        for method in ("exact", "xtrace"):
            with pytest.raises(NonFiniteError, match="layer '2'"):
                relative_flatness(mlp(), bent, data(), layer="2", method=method)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_data_that_change_between_sweeps(self, dtype: torch.dtype) -> None:
        net, (x, y) = mlp().to(dtype), data(40)
        x = x.to(dtype)
        options = {"layer": "2", "curvature": "ggn", "method": "xtrace", "probes": 8}
        generator = torch.Generator().manual_seed(0)

        def augmented(_: int) -> list:
            return cut(x + 0.01 * torch.randn(x.shape, generator=generator, dtype=dtype), y, [20, 20])

        torch.manual_seed(0)
        short = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, drop_last=True)
        for changing in (Fresh(augmented), short):
            with pytest.raises(DataError, match=r"changed.* was .*, then .*augmentation.*drop_last.*'probe'"):
                relative_flatness(net, CE(), changing, **options)
        with pytest.raises(DataError, match=r"40 samples.*then 30"):
            relative_flatness(net, CE(), Fresh(lambda i: cut(x, y, [30, 10])[: 3 - i]), **options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1.0, 50.0])
    def test_another_order_is_no_change(self, dtype: torch.dtype, scale: float) -> None:
        net, (x, y) = mlp().to(dtype), data(40)
        with torch.no_grad():
            y = net(x.to(dtype)).argmax(1)
            net[4].weight.mul_(scale)  # confident and right: a loss near 0
        loader = DataLoader(TensorDataset(x.to(dtype), y), batch_size=7, shuffle=True)
        options = {"layer": "2", "curvature": "ggn", "method": "xtrace", "probes": 8}
        assert relative_flatness(net, CE(), loader, **options).value == pytest.approx(
            relative_flatness(net, CE(), (x.to(dtype), y), **options).value, rel=1e-2
        )

    def test_a_tolerance_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(adaptive, "MOST", 32)
        said = r"rtol=1e-12 is out of reach: after 32 products kappa\(2\)"
        with pytest.raises(ConfigError, match=said):
            relative_flatness(mlp(), CE(), data(), layer="2", method="xtrace", probes=8, rtol=1e-12)
