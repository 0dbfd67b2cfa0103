"""FAM in Lightning: the gradients of one process and one batch, whatever the trainer does to the loss."""

import csv
import warnings

import pytest
import torch
from tiny import assert_same, data, gradients, mlp, plain_gradient
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from relflat import RelflatWarning, relative_flatness
from relflat.errors import ConfigError, DataError, GraphError, LayerError
from unbounded import FAM

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from relflat.integrations.lightning import FAMCallback, FlatnessMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Module(pl.LightningModule):
    """Calls its network, not itself, as most do; keeps the gradients of its first optimiser step."""

    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        self.net = mlp(dtype)
        self.found = None

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, index):
        loss = self.loss(*batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(*batch))

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        if self.found is None:
            self.found = gradients(self.net)


def loader(batch: int = 16, dtype=torch.float64) -> DataLoader:
    return DataLoader(TensorDataset(*data(dtype)), batch_size=batch)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | options))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("layer", ["output", "net.2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_full_batch(accumulate, layer, dtype) -> None:
    module = Module(dtype)
    callback = FAMCallback(layer, strength=0.5, bound=None)
    trainer(callback, accumulate_grad_batches=accumulate).fit(module, loader(16 // accumulate, dtype))
    assert_same(module.found, plain_gradient(dtype=dtype), dtype)


@pytest.mark.parametrize("layer", ["net.0", "net.0.weight"])
def test_hidden_layers_and_parameters_use_probes(layer) -> None:
    module, callback = Module(), FAMCallback(layer, strength=0.5, bound=None, curvature="hessian", method="exact")
    trainer(callback).fit(module, loader())
    model, (x, y) = mlp(), data()
    FAM(nn.CrossEntropyLoss(), model, layer[4:], strength=0.5, curvature="hessian", method="exact")(
        model(x), y
    ).backward()
    assert_same(module.found, gradients(model))


class Manual(Module):
    """Two losses in one step, one of them not of the layer, each with its own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net[0](batch[0]).square().mean() * 0)
        self.manual_backward(self.loss(*batch))
        optimizer.step()


def test_manual_optimisation_with_several_losses() -> None:
    module, callback = Manual(), FAMCallback("net.2", strength=0.5, bound=None)
    trainer(callback).fit(module, loader())
    assert_same(module.found, plain_gradient())


class Other(Module):
    """A loss that no closed form is known for."""

    def loss(self, x, y):
        return other(self.net(x), y)


def other(z, y):
    return nn.functional.cross_entropy(z, y) + z.square().mean()


def test_other_losses_where_the_network_is_named() -> None:
    module, callback = Other(), FAMCallback("output", strength=0.5, bound=None, module="net")
    trainer(callback).fit(module, loader())
    model, (x, y) = mlp(), data()
    FAM(other, model, "output", strength=0.5)(model(x), y).backward()
    assert_same(module.found, gradients(model))


def test_other_losses_without_a_network_say_what_to_do() -> None:
    with pytest.raises(GraphError, match="curvature='hessian'"):
        trainer(FAMCallback("net.0", strength=0.5, bound=None)).fit(Other(), loader())


def test_bf16() -> None:
    module, callback = Module(torch.float32), FAMCallback("output", strength=0.5, bound=None)
    trainer(callback, precision="bf16-mixed").fit(module, loader(16, torch.float32))
    expected = plain_gradient(dtype=torch.float32)
    for mine, other in zip(module.found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.02)


def fp16(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_fp16_scales_the_penalty_with_the_loss() -> None:
    module, callback = Module(torch.float32), FAMCallback("output", strength=0.5, bound=None)
    trainer(callback, plugins=[fp16(1024.0)]).fit(module, loader(16, torch.float32))
    expected = plain_gradient(dtype=torch.float32)
    for mine, other in zip(module.found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.02)


class Saving(Module):
    """Each rank gets its half of the samples; rank 0 writes down the gradients that both then have."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder

    def on_before_optimizer_step(self, optimizer):
        if self.global_rank == 0:
            torch.save(gradients(self.net), self.folder / "gradients.pt")


@pytest.mark.slow
def test_two_processes(tmp_path) -> None:
    run = trainer(FAMCallback("output", strength=0.5, bound=None), strategy="ddp_fork", devices=2)
    run.fit(Saving(tmp_path), loader(8))
    assert_same(torch.load(tmp_path / "gradients.pt"), plain_gradient())


class Overflowing(Module):
    def loss(self, x, y):
        return super().loss(1e6 * x, y)


@pytest.mark.parametrize("blow_up", ["features", "scale"])
def test_overflow_under_fp16_never_reaches_the_weights(blow_up) -> None:
    module = (Overflowing if blow_up == "features" else Module)(torch.float32)
    before = [p.detach().clone() for p in module.parameters()]
    callback = FAMCallback("output", strength=0.5, bound=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RelflatWarning)
        plugin = fp16(1e38 if blow_up == "scale" else 1024.0)
        trainer(callback, plugins=[plugin]).fit(module, loader(16, torch.float32))
    for old, new in zip(before, module.parameters(), strict=True):
        assert torch.equal(old, new)
    assert plugin.scaler.get_scale() < (1e38 if blow_up == "scale" else 1024.0)


def test_logs_are_of_the_plain_loss(tmp_path) -> None:
    module = Module()
    callback = FAMCallback("output", strength=0.5, bound=None)
    run = trainer(callback, accumulate_grad_batches=4, log_every_n_steps=1, logger=CSVLogger(tmp_path))
    run.fit(module, loader(4))
    x, y = data()
    model = mlp()
    criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.5)
    criterion(model(x[12:]), y[12:])
    assert run.callback_metrics["loss"].item() == pytest.approx(criterion.last["task"])
    assert run.callback_metrics["fam/kappa"].item() == pytest.approx(criterion.last["kappa"])
    assert run.callback_metrics["fam/penalty"].item() == pytest.approx(criterion.last["penalty"])


class Kappas(pl.Callback):
    """What the criterion says of each step that had a penalty, read after its batch."""

    def __init__(self, of: FAMCallback) -> None:
        self.of, self.found = of, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if "kappa" in self.of.criterion.last:
            self.found[trainer.global_step - 1] = [self.of.criterion.last[name] for name in ("kappa", "penalty")]


def test_what_is_written_is_of_the_latest_penalty(tmp_path) -> None:
    callback = FAMCallback("output", every=3)
    kappas = Kappas(callback)
    run = trainer(callback, kappas, max_epochs=2, log_every_n_steps=4, logger=CSVLogger(tmp_path))
    run.fit(Module(), loader(2))
    assert list(kappas.found) == [0, 3, 6, 9, 12, 15]
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    rows = {int(row["step"]): row for row in csv.DictReader(text.splitlines())}
    assert list(rows) == [3, 7, 11, 15]
    for step, row in rows.items():
        latest = max(at for at in kappas.found if at <= step)
        assert [float(row[f"fam/{name}"]) for name in ("kappa", "penalty")] == pytest.approx(kappas.found[latest])


def test_validation_is_the_plain_loss_and_hooks_go_away() -> None:
    module = Module()
    run = trainer(FAMCallback("output", strength=0.5, bound=None))
    run.fit(module, loader(), loader())
    x, y = data()
    assert run.callback_metrics["val_loss"].item() == pytest.approx(module.loss(x, y).item())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class TestBadInput:
    def test_unknown_layer(self) -> None:
        with pytest.raises(LayerError, match=r"net\.2"):
            trainer(FAMCallback("head", strength=0.5, bound=None)).fit(Module(), loader())

    def test_unknown_module(self) -> None:
        with pytest.raises(LayerError, match="net"):
            trainer(FAMCallback("head", strength=0.5, bound=None, module="backbone")).fit(Module(), loader())

    def test_layer_that_the_loss_does_not_see(self) -> None:
        class Detached(Module):
            def __init__(self):
                super().__init__()
                self.spare = nn.Linear(2, 2)

        with pytest.raises(GraphError, match="spare"):
            trainer(FAMCallback("spare", strength=0.5, bound=None)).fit(Detached(), loader())

    def test_radius(self) -> None:
        with pytest.raises(ConfigError, match="wrap the criterion"):
            FAMCallback("output", strength=1.0, bound=None, radius=0.1)


class TestMonitor:
    def test_values_are_those_of_relative_flatness(self, tmp_path) -> None:
        module = Module()
        monitor = FlatnessMonitor(["net.0", "net.2"], nn.CrossEntropyLoss(), every=2, method="exact")
        run = trainer(monitor, max_epochs=4, logger=CSVLogger(tmp_path), log_every_n_steps=1)
        run.fit(module, loader(4), loader(8))
        flat = relative_flatness(module, nn.CrossEntropyLoss(), data(), layer="net.0", method="exact")
        assert run.callback_metrics["flatness/net.0"].item() == pytest.approx(flat.value, rel=1e-6)
        assert run.callback_metrics["flatness/loss"].item() == pytest.approx(flat.loss, rel=1e-6)
        assert module.net.training
        lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("flatness/net.2")
        assert sum(bool(line.split(",")[column]) for line in lines[1:]) == 2

    def test_a_module_without_forward(self) -> None:
        class Uncallable(Module):
            forward = pl.LightningModule.forward

        with pytest.raises(ConfigError, match=r"Uncallable has no forward: .* module=.* \(of \['net'\]\)"):
            trainer(FlatnessMonitor("net.2", nn.CrossEntropyLoss())).fit(Uncallable(), loader(), loader())
        with pytest.raises(LayerError, match=r"module='body': Uncallable has \['net'\]"):
            trainer(FlatnessMonitor("2", nn.CrossEntropyLoss(), module="body")).fit(Uncallable(), loader(), loader())
        monitor, module = FlatnessMonitor("2", nn.CrossEntropyLoss(), module="net"), Uncallable()
        trainer(monitor).fit(module, loader(), loader(8))
        flat = relative_flatness(module.net, nn.CrossEntropyLoss(), data(), layer="2")
        assert monitor.history[0].flats["2"].value == pytest.approx(flat.value, rel=1e-6)

    def test_no_data(self) -> None:
        with pytest.raises(DataError, match="data="):
            trainer(FlatnessMonitor("output", nn.CrossEntropyLoss())).fit(Module(), loader())

    def test_every(self) -> None:
        with pytest.raises(ConfigError, match="every=0"):
            FlatnessMonitor("output", nn.CrossEntropyLoss(), every=0)


def test_each_of_several_callbacks_regularises_the_plain_loss() -> None:
    hidden = {"curvature": "hessian", "method": "exact"}
    found = {}
    for names in (["net.0"], ["net.2"], ["net.0", "net.2"], ["net.2", "net.0"]):
        module = Module()
        run = trainer(
            *(FAMCallback(n, strength=0.5, bound=None, **(hidden if n == "net.0" else {})) for n in names),
            max_steps=1,
        )
        run.fit(module, loader())
        found[tuple(names)] = (module.found, run.callback_metrics)
    both, other = found["net.0", "net.2"], found["net.2", "net.0"]
    assert_same(both[0], other[0])
    for name in ("net.0", "net.2"):
        alone = float(found[name,][1]["fam/kappa"])
        assert float(both[1][f"fam/kappa/{name}"]) == pytest.approx(alone, rel=1e-6)


def test_callbacks_of_one_layer_keep_states_of_their_own() -> None:
    one, two = (FAMCallback("net.0", strength=0.5, curvature=c) for c in ("ggn", "hessian"))
    trainer(one, two, max_steps=1).fit(Module(), loader())
    assert one.state_key != two.state_key
    assert one.state_key == FAMCallback("net.0", strength=0.5, curvature="ggn").state_key


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_monitor_converts_batches_as_training_does(precision: str) -> None:
    module = Module(torch.float32)
    run = trainer(FlatnessMonitor("net.2", nn.CrossEntropyLoss()), max_epochs=1, precision=precision)
    run.fit(module, loader(dtype=torch.float32), loader(dtype=torch.float32))
    dtype = next(module.parameters()).dtype
    batches = [(x.to(dtype), y) for x, y in loader(dtype=torch.float32)]
    want = relative_flatness(module, nn.CrossEntropyLoss(), batches, layer="net.2").value
    assert float(run.callback_metrics["flatness/net.2"]) == pytest.approx(want, rel=1e-6)
