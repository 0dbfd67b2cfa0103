"""Results as people use them: numbers, tables, pictures. What is drawn is what was measured."""

import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import relflat
from processes import python
from relflat import ConfigError, Monitor, loss_along, plot, reference, relative_flatness, relative_flatness_by_layer
from relflat.plot.shown import ByLayer

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.pyplot")
matplotlib.use("agg")
CE = nn.CrossEntropyLoss


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


@pytest.fixture(scope="module")
def flats() -> ByLayer:
    """One layer estimated, with an error, and one exact."""
    return relative_flatness_by_layer(mlp(), CE(), data(), layer="*", curvature="ggn", probes=4)


class TestFlatness:
    def test_is_a_number(self, flats) -> None:
        flat = flats["2"]
        assert float(flat) == flat.value
        assert f"{flat:.3f}" == f"{flat.value:.3f}"
        assert f"{flat}" == str(flat)
        assert math.sqrt(flat) == math.sqrt(flat.value)

    def test_is_compared_by_value(self, flats) -> None:
        low, high = sorted(flats.values())
        assert low.value < high.value
        assert low < high.value <= high
        assert not low > high
        assert high >= high.value > low
        assert max(flats.values()) is high
        with pytest.raises(TypeError):
            low < "1"  # noqa: B015

    def test_equality_is_that_of_a_record(self, flats) -> None:
        flat = flats["2"]
        assert flat == replace(flat)
        assert flat != replace(flat, loss=flat.loss + 1)

    def test_becomes_a_dictionary_that_json_takes(self, flats) -> None:
        assert flats["0"].to_dict() == asdict(flats["0"])
        assert json.loads(json.dumps(flats.to_dict())) == {name: asdict(flat) for name, flat in flats.items()}


class TestByLayer:
    def test_is_a_dictionary(self, flats) -> None:
        assert isinstance(flats, dict)
        assert flats == dict(flats)
        assert list(flats) == ["0", "2"]
        assert flats.total == flats["0"].value + flats["2"].value

    def test_prints_as_a_table(self, flats) -> None:
        head, first, second, last = str(flats).splitlines()
        assert head.split() == ["layer", "kappa", "±", "standard", "error", "share", "Tr", "H", "||W||", "method"]
        for name, line in (("0", first), ("2", second)):
            flat = flats[name]
            cells = line.split()
            assert cells[0] == name
            assert float(cells[1]) == pytest.approx(flat.value, rel=1e-4)
            assert cells[2] == (f"{flat.stderr:.2g}" if flat.stderr else "exact")
            assert float(cells[3].rstrip("%")) == pytest.approx(100 * flat.value / flats.total, abs=0.06)
        assert first.endswith(flats["0"].method)
        assert f"loss {flats['2'].loss:.5g}" in last

    def test_no_shares_where_one_is_negative(self, flats) -> None:
        mixed = ByLayer(flats | {"0": replace(flats["0"], value=-1.0)})
        assert [line.split()[3] for line in str(mixed).splitlines()[1:3]] == ["-", "-"]

    def test_renders_as_html_with_names_escaped(self, flats) -> None:
        page = ByLayer({"<b>": flats["0"]})._repr_html_()
        assert page.count("<tr>") == 2
        assert "&lt;b&gt;" in page
        assert "<b>" not in page
        assert f"{flats['0'].value:.5g}" in flats["0"]._repr_html_()

    def test_of_no_layers(self) -> None:
        assert str(ByLayer()).startswith("layer")


class TestLayers:
    def test_bars_and_whiskers_are_values_and_errors(self, flats) -> None:
        axes = flats.plot()
        assert [bar.get_width() for bar in axes.patches] == [flat.value for flat in flats.values()]
        assert [text.get_text() for text in axes.get_yticklabels()] == list(flats)
        (whisker,) = [c for c in axes.containers if type(c).__name__ == "ErrorbarContainer"]
        (segment,) = whisker.lines[2][0].get_segments()
        estimated = flats["0"]
        assert segment[:, 0].tolist() == pytest.approx(
            [estimated.value - estimated.stderr, estimated.value + estimated.stderr]
        )
        assert axes.get_xlabel() == "kappa, units of the loss (± standard error)"

    def test_one_layer_and_several_groups(self, flats) -> None:
        assert [bar.get_width() for bar in flats["2"].plot(number="trace").patches] == [flats["2"].trace]
        groups = {"before": flats, "after": flats["2"]}
        axes = plot.layers(groups)
        assert [bar.get_width() for bar in axes.patches] == [f.value for f in (*flats.values(), flats["2"])]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(groups)

    def test_a_legend_of_long_names_lies_within_the_figure(self, flats) -> None:
        axes = plot.layers({f"after {epochs} epochs of plain training": flats for epochs in (1, 10, 100)})
        axes.figure.canvas.draw()
        assert axes.get_legend().get_window_extent().x1 <= axes.figure.bbox.x1

    def test_keeps_what_a_notebook_sets_with_the_first_figure(self, flats, monkeypatch) -> None:
        figure = matplotlib.pyplot.figure

        def as_inline(*args, **options):
            matplotlib.interactive(True)  # without it cells that follow show no figure
            return figure(*args, **options)

        monkeypatch.setattr(matplotlib.pyplot, "figure", as_inline)
        monkeypatch.setitem(matplotlib.rcParams, "interactive", False)
        flats.plot()
        assert matplotlib.is_interactive()

    def test_draws_where_it_is_told(self, flats) -> None:
        given = matplotlib.figure.Figure().add_subplot()
        assert flats.plot(ax=given, log=True) is given
        assert given.get_xscale() == "log"

    @pytest.mark.parametrize(
        ("draw", "message"),
        [
            (lambda flats: plot.layers({}), "no layer"),
            (lambda flats: flats.plot(number="method"), "number='method'"),
            (lambda flats: plot.history([]), "nothing was measured"),
            (lambda flats: plot.samples([]), "0 samples"),
            (lambda flats: plot.samples([1.0, 2.0], names=["a"]), "2 samples, 1 names"),
            (lambda flats: plot.landscape({}), "no loss"),
        ],
    )
    def test_nothing_to_draw(self, flats, draw, message) -> None:
        with pytest.raises(ConfigError, match=message):
            draw(flats)


class TestHistory:
    @pytest.mark.parametrize("layers", [2, 8, 15])
    def test_lines_are_what_was_measured(self, flats, layers) -> None:
        def at(step):
            return ByLayer({f"{i}": replace(flats["0"], value=1.0 + i + step) for i in range(layers)})

        axes = plot.history([(step, at(step)) for step in (0, 10, 20)])
        assert len(axes.lines) == layers
        for i, line in enumerate(axes.lines):
            assert line.get_xdata().tolist() == [0, 10, 20]
            assert line.get_ydata().tolist() == [1.0 + i, 11.0 + i, 21.0 + i]
        band = axes.collections[0].get_paths()[0].get_extents()
        assert band.ymax == pytest.approx(21.0 + flats["0"].stderr)
        assert (axes.get_legend() is None) == (layers == 15)
        assert len({line.get_color() for line in axes.lines}) == layers

    def test_a_layer_that_comes_later(self, flats) -> None:
        axes = plot.history([(0, {"2": flats["2"]}), (5, flats)])
        assert {line.get_label(): line.get_xdata().tolist() for line in axes.lines} == {"2": [0, 5], "0": [5]}


class TestSamples:
    @pytest.mark.parametrize("n", [1, 3, 9])
    def test_sorted_with_the_extremes_named(self, n) -> None:
        values = torch.arange(1.0, n + 1)[torch.randperm(n)]
        names = [f"s{int(v)}" for v in values]
        axes = plot.samples(values, names=names, extremes=2)
        assert axes.lines[0].get_ydata().tolist() == sorted(values.tolist(), reverse=True)
        texts = [text.get_text() for text in axes.texts]
        assert f"mean {float(values.mean()):.4g}" in texts
        shown = {1: [], 3: ["sharpest: s3", "flattest: s1"], 9: ["sharpest: s9, s8", "flattest: s2, s1"]}[n]
        assert [text for text in texts if "est" in text] == shown

    def test_the_mean_of_measured_ones_is_kappa_of_the_whole(self) -> None:
        net, batch = mlp(), data()
        axes = plot.samples(relflat.per_sample_flatness(net, CE(), batch, layer="output"))
        whole = relative_flatness(net, CE(), batch, layer="output").value
        dashed = next(line for line in axes.lines if line.get_linestyle() == "--")
        assert dashed.get_ydata()[0] == pytest.approx(whole, rel=1e-9)


class TestLandscape:
    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_kappa_is_its_curvature(self, layer) -> None:
        """Second differences along many directions, against the definition in float64; wide and tall weights."""
        net, batch = mlp(), data()
        along = loss_along(net, CE(), batch, layer=layer, radius=1e-3, draws=400, points=3)
        bends = (along.losses[:, 0] - 2 * along.losses[:, 1] + along.losses[:, 2]) / along.radii[2] ** 2
        loss, W = reference.at_layer(net, CE(), *batch, layer)
        want = float(reference.kappa(loss, W).detach()) / W.shape[1]
        assert along.features == W.shape[1]
        assert float(bends.mean()) == pytest.approx(want, abs=4 * float(bends.std()) / 20)
        assert float(bends.std()) / 20 < 0.25 * abs(want)
        plain = float(loss(W).detach())
        assert along.losses[:, 1].tolist() == pytest.approx([plain] * 400, rel=1e-12)
        assert float(along.parabola()[2]) == pytest.approx(plain + 1e-6 / 2 * want, rel=1e-9)

    def test_the_model_is_as_it_was_and_batches_do_not_matter(self) -> None:
        net, (x, y) = mlp(), data()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        whole = loss_along(net, CE(), (x, y), layer="0", draws=2, points=3)
        cut = loss_along(net, CE(), list(zip(x.split(7), y.split(7), strict=True)), layer="0", draws=2, points=3)
        assert torch.allclose(whole.losses, cut.losses, rtol=1e-12)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_drawn_as_measured(self) -> None:
        net, batch = mlp(), data()
        along = loss_along(net, CE(), batch, layer="2", draws=2, points=5)
        axes = plot.landscape({"before": along})
        drawn = [line.get_ydata() for line in axes.lines]
        for want in (*along.losses, along.losses.mean(0), along.parabola()):
            assert any(torch.allclose(torch.as_tensor(y), want) for y in drawn if len(y) == 5)
        rise = plot.landscape(along, rise=True)
        assert rise.lines[0].get_ydata()[2] == pytest.approx(0, abs=1e-12)
        assert rise.get_ylabel() == "rise of the loss"

    @pytest.mark.parametrize("wrong", [{"points": 2}, {"draws": 0}, {"radius": -1.0}])
    def test_refused(self, wrong) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            loss_along(mlp(), CE(), data(), layer="2", **wrong)


class TestMonitor:
    def test_measures_when_due_what_relative_flatness_does(self) -> None:
        net, batch, logged, wanted = mlp(), data(), {}, {}
        keep = lambda found, step: logged.update({step: found})
        monitor = Monitor(net, CE(), batch, every=2, curvature="ggn", log=keep)
        for step in range(4):
            if step % 2 == 0:
                wanted[step] = relative_flatness_by_layer(net, CE(), batch, layer="*", curvature="ggn")
            assert (monitor() is None) == bool(step % 2)
            with torch.no_grad():
                net[0].weight.mul_(1.5)
        assert dict(monitor.history) == wanted
        assert {s: found["flatness/2"] for s, found in logged.items()} == {s: f["2"].value for s, f in wanted.items()}
        assert logged[0]["flatness/loss"] == wanted[0]["0"].loss
        lines = {line.get_label(): line.get_ydata().tolist() for line in monitor.plot().lines}
        assert lines == {name: [f[name].value for f in wanted.values()] for name in ("0", "2")}

    def test_steps_may_be_told(self) -> None:
        monitor = Monitor(mlp(), CE(), data(), "output", every=100)
        assert [monitor(step) is not None for step in (0, 50, 100, 150, 200)] == [True, False, True, False, True]
        assert [step for step, _ in monitor.history] == [0, 100, 200]
        assert (
            repr(monitor)
            == f"Monitor(every=100, measured 3 times, last at step 200: {monitor.history[-1].flats.total:.4g})"
        )
        monitor()
        assert len(monitor.history) == 3

    def test_refused(self) -> None:
        with pytest.raises(ConfigError, match="every=0"):
            Monitor(mlp(), CE(), data(), every=0)


def test_pictures_without_matplotlib_name_the_extra(flats, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "relflat\[plot\]"'):
        flats.plot()


@pytest.mark.xdist_group("bare")
def test_nothing_is_drawn_with_before_it_is_asked_for() -> None:
    code = "import sys, relflat; relflat.plot.layers; print('matplotlib' in sys.modules)"
    assert python(code) == (0, "False\n", "")
