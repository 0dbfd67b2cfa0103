"""Keras 3 on its torch backend: ``FAMMixin`` for models of any kind, and ``TorchLoss``, which has a closed form.

Keras calls its layers past the hooks of ``torch.nn.Module``. The layers that FAM watches therefore compute by way of
a ``torch.nn.Linear`` on the same variables, which gives the same numbers and has hooks.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relflat.capture.kinds import kind_of
from relflat.capture.resolve import nearest
from relflat.errors import ConfigError, LayerError, LossError
from relflat.fam import FAM
from relflat.integrations.common import extra, fam_for_computed_loss

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is first imported
with extra("keras"):
    import keras
    from keras.layers import TorchModuleWrapper

if keras.backend.backend() != "torch":
    raise ImportError(
        f"relflat.integrations.keras needs the torch backend of Keras, and it runs on {keras.backend.backend()!r}: "
        "set the environment variable KERAS_BACKEND=torch, or import this module before Keras"
    )

if TYPE_CHECKING:
    _Base = keras.Model
else:
    _Base = object


class FAMMixin(_Base):  # type: ignore[misc, valid-type]  # Keras is not typed
    """Adds ``strength * kappa`` of some layers to the training loss of a Keras model.

    ``compile`` takes ``fam={"layer": ..., "strength": ...}`` and any other argument of :class:`relflat.FAM`, except
    ``radius`` and ``method="finite_difference"``, which need the criterion itself. A layer is the name of a ``Dense``
    layer or of a ``TorchModuleWrapper`` around a layer that FAM knows, a list of names, or ``"output"``: the last of
    these. Whatever ``compute_loss`` returns is regularised as it is. ``evaluate``, ``predict``, weights and saved
    files are those of the plain model; the loss that ``fit`` shows has the penalty in it. Random directions depend on
    the seed and ``optimizer.iterations``, so that a run that is resumed with its optimiser draws the same.

    Raises:
        ConfigError: in ``compile``, for options that make no sense here.
        LayerError: in the first step of ``fit``, if there is no such layer; lists the candidates.

    Example:
        >>> class FAMSequential(FAMMixin, keras.Sequential):  # doctest: +SKIP
        ...     pass
    """

    def compile(self, *args: Any, fam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Configure training as Keras does, with FAM; without ``fam`` training is plain."""
        super().compile(*args, **kwargs)
        if fam is not None:
            _check_fam(fam)
            if self.jit_compile:
                raise ConfigError("jit_compile=True compiles the hooks away; use jit_compile=False with fam=")
        if self.criterion is not None:
            self.criterion.close()
        self._keep(None if fam is None else dict(fam), None)

    @property
    def criterion(self) -> FAM | None:
        """The FAM in use, from the first training step on; its ``last`` has the last step in numbers."""
        return self._fam_state[1]

    _fam_state: tuple[dict[str, Any] | None, FAM | None] = (None, None)
    _fam_pass: nn.Module | None = None  # while a training step runs

    def _keep(self, options: dict[str, Any] | None, criterion: FAM | None) -> None:
        object.__setattr__(self, "_fam_state", (options, criterion))  # Keras would take FAM for a layer

    def get_compile_config(self) -> dict[str, Any]:
        """What a saved model keeps of ``compile``."""
        config = super().get_compile_config()
        fam = self._fam_state[0]
        return config if fam is None else {**config, "fam": fam}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Configure training as it was when the model was saved."""
        fam = config.pop("fam", None)
        self.compile(**keras.saving.deserialize_keras_object(config), fam=fam)
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> Any:
        """One step, watched."""
        options, criterion = self._fam_state
        if options is None:
            return super().train_step(data)
        if criterion is None:
            criterion = self._new_fam(options)
            self._keep(options, criterion)
        criterion.step = int(self.optimizer.iterations)
        object.__setattr__(self, "_fam_pass", criterion.keras_pass)
        try:
            return super().train_step(data)
        finally:
            object.__setattr__(self, "_fam_pass", None)
            criterion.reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, where PyTorch sees it in a training step."""
        call = super().__call__
        return call(*args, **kwargs) if self._fam_pass is None else self._fam_pass(call, *args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the model's own loss, plus the penalty while it trains."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        if self.criterion is None or not training:
            return loss
        return loss + self.criterion.penalty(loss)

    def _new_fam(self, fam: Mapping[str, Any]) -> FAM:
        options = dict(fam)
        layers = _chosen(self, options.pop("layer"))
        run = _Pass({name: _with_hooks(layer) for name, layer in layers.items()})
        where = f"{type(self).__name__}.compile(fam=...)"
        criterion = fam_for_computed_loss(run, list(layers), options, where)
        object.__setattr__(criterion, "keras_pass", run)  # the criterion itself holds no reference to it
        return criterion


class TorchLoss(keras.losses.Loss):  # type: ignore[misc]  # Keras is not typed
    """A loss of PyTorch as one of Keras. FAM recognises these; Keras' own are differentiated twice.

    Args:
        loss_fn: ``loss_fn(outputs, targets)`` that returns a scalar, such as ``nn.CrossEntropyLoss()``, on logits.
        name: for Keras.

    Raises:
        LossError: for sample weights, which such a loss has no place for.
    """

    def __init__(self, loss_fn: Callable[..., Tensor], name: str = "loss") -> None:
        super().__init__(name=name)
        self.loss_fn = loss_fn

    def __call__(self, y_true: Any, y_pred: Tensor, sample_weight: Any = None) -> Tensor:
        """The loss of a batch."""
        if sample_weight is not None:
            raise LossError(
                f"{type(self.loss_fn).__name__} takes no sample weights; give the loss class weights, or use one of "
                "keras.losses (FAM then differentiates it)"
            )
        y = torch.as_tensor(y_true, device=y_pred.device)
        if y.ndim == y_pred.ndim and y.shape[-1] == 1 and not y.is_floating_point():
            y = y.squeeze(-1)  # Keras often keeps labels as a column
        if not y.is_floating_point():
            y = y.long()
        return self.loss_fn(y_pred, y)


def _check_fam(fam: Mapping[str, Any]) -> None:
    missing = [name for name in ("layer", "strength") if name not in fam]
    if missing:
        raise ConfigError(f"fam={dict(fam)}: {missing[0]!r} is missing; give at least layer and strength")


def _chosen(model: Any, layer: Any) -> dict[str, Any]:
    """The Keras layers that the user named."""
    found = {x.name: x for x in model._flatten_layers() if _supported(x)}
    candidates = f"candidates: {list(found)} (Dense, or TorchModuleWrapper around a layer of PyTorch)"
    chosen = {}
    for name in [layer] if isinstance(layer, str) else layer:
        if name == "output" and found and name not in found:
            name = list(found)[-1]
        if name not in found:
            near = nearest(str(name), list(found))
            raise LayerError(
                f"no layer named {name!r}; {f'did you mean {near}? ' if near else ''}{candidates}"
            )
        chosen[name] = found[name]
    return chosen


def _supported(layer: Any) -> bool:
    if isinstance(layer, TorchModuleWrapper):
        return kind_of(layer.module) is not None
    return type(layer) is keras.layers.Dense and layer.quantization_mode is None


def _with_hooks(layer: Any) -> nn.Module:
    """The module of PyTorch that a layer runs, or from now on runs."""
    if isinstance(layer, TorchModuleWrapper):
        return layer.module
    linear = _Linear(layer)

    def call(inputs: Any, training: Any = None) -> Any:
        z = linear(inputs)
        return z if layer.activation is None else layer.activation(z)

    if not isinstance(getattr(layer.call, "linear", None), _Linear):
        call.linear = linear  # type: ignore[attr-defined]
        layer.call = call
    return layer.call.linear


class _Pass(nn.Module):
    """A forward pass of the Keras model as one of a module of PyTorch that has the watched layers."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in layers.items():
            self.register_module(name, module)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return call(*args, **kwargs)


class _Linear(nn.Linear):
    """A Dense layer's product with its kernel, on the variables of that layer."""

    def __init__(self, dense: Any) -> None:
        nn.Module.__init__(self)
        self._dense = (dense,)  # in a tuple, so that it is no submodule
        self.register_parameter("kernel", dense._kernel.value)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The kernel as (d, m), in the type that the layer computes in."""
        return keras.ops.convert_to_tensor(self._dense[0].kernel).mT

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias, if any."""
        bias = self._dense[0].bias
        return None if bias is None else keras.ops.convert_to_tensor(bias)
