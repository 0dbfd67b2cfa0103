"""Keras 3 on its torch backend: ``FAMMixin`` for models of any kind, and ``TorchLoss``, which has a closed form.

Keras calls its layers past the hooks of ``torch.nn.Module``. The layers that FAM watches therefore compute by way of
a ``torch.nn.Linear`` on the same variables, which gives the same numbers and has hooks.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relflat.capture.kinds import kind_of
from relflat.capture.resolve import nearest
from relflat.errors import ConfigError, LayerError, LossError
from relflat.fam import FAM
from relflat.integrations.common import check_options, extra, fam_for_computed_loss

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
    """Adds FAM's penalty to the training loss of a Keras model.

    ``compile`` takes ``fam={}``, or in it ``"layer"`` and any other argument of :class:`relflat.FAM`, except
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
        where = f"{type(self).__name__}.compile(fam=...)"
        if fam is not None:
            check_options(fam, where)
            if self.jit_compile:
                raise ConfigError("jit_compile=True compiles the hooks away; use jit_compile=False with fam=")
        if self.criterion is not None:
            self.criterion.close()
        self._fam = None if fam is None else _Fam(fam, where)

    @property
    def criterion(self) -> FAM | None:
        """The FAM in use, from the first training step on; its ``last`` has the last step in numbers."""
        return None if self._fam is None else self._fam.criterion

    _fam: "_Fam | None" = None

    def get_compile_config(self) -> dict[str, Any]:
        """What a saved model keeps of ``compile``."""
        config = super().get_compile_config()
        return config if self._fam is None else {**config, "fam": self._fam.options}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Configure training as it was when the model was saved."""
        fam = config.pop("fam", None)
        self.compile(**keras.saving.deserialize_keras_object(config), fam=fam)
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> Any:
        """One step, watched."""
        if self._fam is None:
            return super().train_step(data)
        with self._fam.watching(self):
            return super().train_step(data)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, where PyTorch sees it in a training step."""
        call, fam = super().__call__, self._fam
        if fam is None or fam.forward is None or not fam.in_step:
            return call(*args, **kwargs)
        return fam.forward(call, *args, **kwargs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the model's own loss, plus the penalty while it trains."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        if self.criterion is None or not training:
            return loss
        return loss + self.criterion.penalty(loss)


class _Fam:
    """FAM of a compiled model, in an object of its own: a criterion among the attributes of a model were a layer."""

    def __init__(self, options: Mapping[str, Any], where: str) -> None:
        self.options, self.where = dict(options), where
        # Both are made in the first step, as Keras builds layers when it first calls them.
        self.forward: _Forward | None = None
        self.criterion: FAM | None = None
        self.in_step = False

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """A training step of the model."""
        if self.criterion is None:
            layers = _chosen(model, self.options["layer"])
            self.forward = _Forward({name: _with_hooks(layer) for name, layer in layers.items()})
            options = self.options | {"layer": list(layers)}
            self.criterion = fam_for_computed_loss(self.forward, options, self.where)
        self.criterion.step = int(model.optimizer.iterations)
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False
            self.criterion.reset()


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
            raise LayerError(f"no layer named {name!r}; {f'did you mean {near}? ' if near else ''}{candidates}")
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
    if not isinstance(layer.call, _Call):
        layer.call = _Call(layer)
    return layer.call.linear


class _Call:
    """What a Dense layer computes, its product by way of a module that has hooks."""

    def __init__(self, dense: Any) -> None:
        self.dense, self.linear = dense, _Linear(dense)

    def __call__(self, inputs: Any, training: Any = None) -> Any:
        z = self.linear(inputs)
        return z if self.dense.activation is None else self.dense.activation(z)


class _Forward(nn.Module):
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
    def weight(self) -> Tensor:  # type: ignore[override]  # an attribute there
        """The kernel as (d, m), in the type that the layer computes in."""
        return keras.ops.convert_to_tensor(self._dense[0].kernel).mT

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # an attribute there
        """The bias, if any."""
        bias = self._dense[0].bias
        return None if bias is None else keras.ops.convert_to_tensor(bias)
