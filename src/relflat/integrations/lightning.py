"""Lightning: ``FAMCallback`` adds the penalty to any module's loss, ``FlatnessMonitor`` logs relative flatness."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError, GraphError, LayerError
from relflat.fam import FAM
from relflat.integrations.common import check_options, converted, extra, fam_for_computed_loss
from relflat.integrations.monitor import Monitor, metrics
from relflat.measure.batches import Batch

with extra("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class FAMCallback(Callback):
    """Adds FAM's penalty to the loss just before each backward pass: ``FAMCallback()`` needs no tuning.

    The module stays as it is. What is logged as its loss is the plain task loss; the latest penalty is logged as
    ``fam/penalty`` and its kappa as ``fam/kappa``, both of the plain loss, whatever accumulation and gradient scaling
    made of it; with several such callbacks, each of which regularises the plain loss, also as ``fam/kappa/LAYER``.
    Precision, accumulation, gradient clipping, several optimisers and manual optimisation work as without it; with
    several losses, those that depend on the layers count. Steps are calls of backward. The step and the seed are
    kept in checkpoints, so that a resumed run is the uninterrupted one.

    Args:
        layer: qualified name, glob, or list of those, within the LightningModule (or ``module``), or ``"output"``:
            the layer whose outputs the loss is computed from; by default all.
        strength: lambda, as in :class:`relflat.FAM`; without it, the penalty has FAM's ``size``.
        module: name of the submodule that is called as the network. By default all of ``training_step`` is
            watched; give it where the loss is not a cross-entropy, BCE with logits or squared error and
            ``curvature="ggn"`` needs to know the network's outputs.
        **options: of :class:`relflat.FAM`, except ``radius`` and ``method="finite_difference"``: they need the
            criterion itself, so use FAM as the criterion in ``training_step``.

    Raises:
        LayerError: when fitting starts, if there is no such layer; lists the candidates.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FAMCallback()], logger=False)
    """

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        *,
        strength: float | None = None,
        module: str | None = None,
        **options: Any,
    ) -> None:
        self.layer, self.module = layer, module
        self.options = {"layer": layer, "strength": strength, **options}
        check_options(self.options, "FAMCallback")
        self.criterion: FAM | None = None
        self._step, self._seed = 0, options.get("seed")
        self._losses = 0
        self._scale = 1.0

    @property
    def state_key(self) -> str:
        """One for each choice of options, so that several callbacks can be used together."""
        given = {name: x for name, x in self.options.items() if x is not None and not callable(x)}
        return self._generate_state_key(module=self.module, **given)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step and the seed."""
        return {"step": self._step if self.criterion is None else self.criterion.step, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._step, self._seed = state_dict["step"], state_dict["seed"]
        if self.criterion is not None:
            self._build(self.criterion_model)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers."""
        if stage != "fit":
            return
        if self._seed is None:
            self._seed = torch.initial_seed()
        self._build(_network(pl_module, self.module))

    def _build(self, model: nn.Module) -> None:
        self._close()
        self.criterion_model = model
        self.criterion = fam_for_computed_loss(model, self.options | {"seed": self._seed}, "FAMCallback")
        self.criterion.step = self._step

    def _close(self) -> None:
        if self.criterion is not None:
            self.criterion.close()
        self.criterion = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to watch."""
        assert self.criterion is not None
        self._losses, self._step = 0, self.criterion.step
        if self.module is None:
            self.criterion.watch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the penalties of all such callbacks, in place: Lightning passes on the tensor it gave.

        The first does so for all, as each penalty is that of the plain loss.
        """
        all_of_them = _all(trainer)
        if all_of_them[0] is not self:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        if pl_module.automatic_optimization:
            scale /= trainer.accumulate_grad_batches
        penalties = [callback._penalty(loss, scale) for callback in all_of_them]
        for penalty in penalties:
            loss.add_(penalty)

    def _penalty(self, loss: Tensor, scale: float) -> Tensor:
        assert self.criterion is not None
        self._scale = scale
        self._losses += 1
        return self.criterion.penalty(loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and forget the batch.

        Raises:
            GraphError: if no loss of the batch depended on the layers.
        """
        assert self.criterion is not None
        self.criterion.reset()
        if self._losses and self.criterion.step == self._step:
            raise GraphError(
                f"no loss of this batch was computed from layer {self.layer!r}: it was not called in training_step, "
                f"or its outputs were detached; name a layer that is used (of {self.criterion.layers})"
            )
        last = self.criterion._last  # as tensors: Lightning waits for the device when it writes, and not before
        if "kappa" in last:
            endings = ["", *("/" + "+".join(self.criterion.layers) for _ in _all(trainer)[1:2])]
            for name, ending in itertools.product(("kappa", "penalty"), endings):
                pl_module.log(f"fam/{name}{ending}", last[name] / self._scale)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks; the step is kept."""
        if self.criterion is not None:
            self._step = self.criterion.step
        self._close()


def _all(trainer: Trainer) -> list[FAMCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FAMCallback)]  # type: ignore[attr-defined]  # set later


def _network(pl_module: LightningModule, name: str | None) -> nn.Module:
    """The submodule of a name, the whole module without one."""
    try:
        return pl_module if name is None else pl_module.get_submodule(name)
    except AttributeError as error:
        raise LayerError(
            f"module={name!r}: {type(pl_module).__name__} has {[n for n, _ in pl_module.named_children()]}"
        ) from error


class FlatnessMonitor(Monitor, Callback):
    """Measures layers every so many epochs and logs them through the module's loggers.

    Logged are ``flatness/LAYER``, its standard error where it has one, the norm of its weight, and loss and mean
    confidence over the same data. Batches are converted as in training (``Trainer(precision="64-true")``). With
    several processes each measures its share of the data and the values are averaged, which is exact for equal
    shares.

    Args:
        layer: as for :func:`relflat.relative_flatness_by_layer`, within the LightningModule (or ``module``).
        loss_fn: ``loss_fn(outputs, targets)``.
        data: batches; by default the first validation loader.
        every: epochs from one measurement to the next.
        module: name of the submodule that is measured as the network, where the LightningModule has no ``forward``.
        **options: of :func:`relflat.relative_flatness_by_layer`; its ``forward(module, batch)`` returns outputs and
            targets, and by default calls the module on the inputs.

    Attributes:
        history: pairs ``(epoch, flats)``; ``plot()`` draws them.

    Raises:
        ConfigError: for ``every`` below 1; when fitting starts, for a module without ``forward``.
        LayerError: when fitting starts, if there is no such ``module``.
    """

    unit = "epoch"

    def __init__(
        self,
        layer: Layer,
        loss_fn: Callable[..., Any],
        data: Iterable[Batch] | None = None,
        *,
        every: int = 1,
        module: str | None = None,
        **options: Any,
    ) -> None:
        self.module = module
        super().__init__(None, loss_fn, data, layer, every=every, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot be called, before an epoch is trained."""
        called = _network(pl_module, self.module)
        if getattr(called.forward, "__func__", None) is LightningModule.forward:
            names = [name for name, _ in called.named_children()]
            raise ConfigError(
                f"FlatnessMonitor calls the module on the inputs, and {type(called).__name__} has no forward: define "
                f"it, or give module=, the name of the network in it (of {names})"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure; here, not in the validation hooks, as those run where gradients cannot be taken."""
        epoch = trainer.current_epoch + 1
        if not self.due(epoch):
            return
        data = self.data
        if data is None:
            loaders = trainer.val_dataloaders
            data = loaders[0] if isinstance(loaders, list | tuple) else loaders
        plugin, network = trainer.precision_plugin, _network(pl_module, self.module)
        if data is not None:
            data = converted(data, plugin.convert_input)
        with plugin.tensor_init_context():
            found = self.measure(network, self.loss_fn, data, "there is no validation loader", epoch)
        pl_module.log_dict(metrics(found), sync_dist=trainer.world_size > 1)
