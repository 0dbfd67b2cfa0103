"""Transformers: ``FAMTrainer``, ``FAMMixin`` for Trainers of your own, and ``FlatnessCallback``."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relflat.capture.outputs import output_tensor
from relflat.capture.resolve import Layer
from relflat.errors import ConfigError, DataError, GraphError, LossError
from relflat.fam import FAM
from relflat.integrations.common import check_options, extra, fam_for_computed_loss
from relflat.integrations.monitor import Monitor, metrics
from relflat.measure.batches import Batch

with extra("transformers"):
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class FAMStep(TrainerCallback, ExportableState):
    """Keeps the number of calls in the trainer's state, so that a resumed run goes on where it was."""

    def __init__(self) -> None:
        self.step = 0

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``."""
        return {"args": {}, "attributes": {"step": self.step}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint, or from the start."""
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.step = saved.get("attributes", {}).get("step", 0)


class FAMMixin(_Base):
    """Adds FAM's penalty to the training loss of a Trainer.

    Whatever loss ``compute_loss`` of the classes after this one returns is regularised as it is: its scale
    (``num_items_in_batch``, accumulation, processes) carries over to kappa. Where it is a cross-entropy, BCE with
    logits or squared error of the head's outputs (sequence and token classification, language models, regression),
    whoever computed it, kappa is a closed form; otherwise probes. Evaluation, prediction, saving and loading are
    untouched. Each log of the training loss has ``fam_share``, the penalty's share in it. Steps are calls of
    ``compute_loss``; their number is kept in checkpoints.

    Args:
        *args: of the Trainer.
        fam: arguments of :class:`relflat.FAM`, which needs none, except ``radius`` and
            ``method="finite_difference"``, which need the criterion itself. The seed is that of the training
            arguments if not given.
        **kwargs: of the Trainer.

    Raises:
        LayerError: if there is no such layer; lists the candidates.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class MyTrainer(FAMMixin, Seq2SeqTrainer):
        ...     pass
    """

    def __init__(self, *args: Any, fam: Mapping[str, Any] = MappingProxyType({}), **kwargs: Any) -> None:
        check_options(fam, type(self).__name__)
        super().__init__(*args, **kwargs)
        self._fam_options = {"seed": self.args.seed} | dict(fam)
        self._fam: FAM | None = None
        self._fam_model: nn.Module | None = None
        self._fam_wrapped: nn.Module | None = None
        self._fam_sums: list[Tensor | float] = [0.0, 0.0]
        self.add_callback(FAMStep())
        if self.model is not None:
            self._fam_of(self.model)

    @property
    def criterion(self) -> FAM:
        """The FAM in use; ``trainer.criterion.last`` has the last step in numbers."""
        if self._fam is None:
            raise ConfigError("the model does not exist before train() is called (model_init)")
        return self._fam

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the Trainer, plus the penalty while the model trains."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_labels(inputs)
        criterion = self._fam_of(model)
        criterion.reset()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        count = next(c for c in self.callback_handler.callbacks if isinstance(c, FAMStep))
        criterion.step = count.step
        try:
            penalty = criterion.penalty(loss)
        except (GraphError, LossError) as error:
            if output_tensor(outputs, other_than=loss) is not None:
                raise
            raise GraphError(
                f"{error}. The model gave no logits, as where the loss is fused with the head (TRL's own, Liger): "
                "give the Trainer compute_loss_func=, or override compute_loss, with a loss of outputs.logits"
            ) from error
        count.step = criterion.step
        loss = loss + penalty
        self._fam_sums = [self._fam_sums[0] + penalty.detach(), self._fam_sums[1] + loss.detach()]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the penalty's share in the training loss since the last time."""
        if "loss" in logs:
            penalty, total = map(float, self._fam_sums)
            self._fam_sums = [0.0, 0.0]
            if total:
                logs["fam_share"] = penalty / total
        super().log(logs, *args, **kwargs)

    def _fam_of(self, model: nn.Module) -> FAM:
        """The FAM that watches the network inside ``model``; a new one if ``model_init`` made a new network."""
        if self._fam is None or model is not self._fam_wrapped:
            network = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            if self._fam is None or network is not self._fam_model:
                self._fam = fam_for_computed_loss(network, self._fam_options, type(self).__name__)
            self._fam_model, self._fam_wrapped = network, model
        return self._fam

    def _check_labels(self, inputs: Mapping[str, Any]) -> None:
        plain = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        missing = [name for name in self.label_names if name not in inputs]
        if plain and missing and not self.can_return_loss:
            raise LossError(
                f"the batch has no {missing[0]!r} (it has {list(inputs)}), so the model computes no loss to "
                "regularise; keep that column in the data set and collator, or name yours in "
                "TrainingArguments(label_names=[...])"
            )


class FAMTrainer(FAMMixin, Trainer):
    """The Trainer with FAM; see :class:`FAMMixin`.

    Example:
        >>> FAMTrainer(model, args, train_dataset=data, fam={"size": 0.001})  # doctest: +SKIP
    """


class FlatnessCallback(Monitor, TrainerCallback):
    """Measures layers every so many epochs and logs them as the Trainer logs everything else.

    Add it to the trainer it logs through: ``trainer.add_callback(FlatnessCallback(trainer, "output"))``.

    Args:
        trainer: any Trainer.
        layer: as for :func:`relflat.relative_flatness_by_layer`.
        loss_fn: ``loss_fn(outputs, targets)``; by default what the model's kind of head is trained with.
        data: batches; by default the trainer's evaluation data.
        **options: ``every``, epochs from one measurement to the next, and those of
            :func:`relflat.relative_flatness_by_layer`; its ``forward(model, batch)`` by default returns logits and
            labels, shifted for language models.

    Attributes:
        history: pairs ``(epoch, flats)``; ``plot()`` draws them.
    """

    unit = "epoch"

    def __init__(
        self,
        trainer: Trainer,
        layer: Layer,
        loss_fn: Callable[..., Any] | None = None,
        data: Iterable[Batch] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(None, loss_fn, data, layer, **options)
        self.trainer = trainer
        self.options["forward"] = options.get("forward") or logits_and_labels

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and log."""
        epoch = round(state.epoch)
        if not self.due(epoch):
            return
        data = self.data
        if data is None and self.trainer.eval_dataset is not None:
            data = self.trainer.get_eval_dataloader()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        loss_fn = self.loss_fn or loss_of_head(model)
        found = self.measure(model, loss_fn, data, "the trainer has no eval_dataset", epoch)
        self.trainer.log(metrics(found))


def loss_of_head(model: nn.Module) -> nn.Module:
    """The loss that a model's head is trained with, by its ``problem_type``; cross-entropy if it has none."""
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    one_number = getattr(config, "num_labels", 0) == 1 and _loss_type(model) == "ForSequenceClassification"
    if kind == "regression" or (kind is None and one_number):
        return nn.MSELoss()
    return nn.BCEWithLogitsLoss() if kind == "multi_label_classification" else nn.CrossEntropyLoss()


def logits_and_labels(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a model on a batch: logits with the classes in dimension 1, and the labels that belong to them."""
    if "labels" not in batch:
        raise DataError(f"the batch has no 'labels' (it has {list(batch)}); pass forward=")
    labels = batch["labels"]
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    drop = () if encoder_decoder else ("labels",)
    logits = model(**{k: v for k, v in batch.items() if k not in drop}).logits
    if logits.ndim == 2 and logits.shape[1] == 1 and labels.is_floating_point():
        return logits.squeeze(1), labels.reshape(-1)
    if logits.ndim > 2:
        if _predicts_next(model) and not encoder_decoder:
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        logits = logits.movedim(-1, 1)
    return logits, labels.to(torch.get_default_dtype()) if labels.is_floating_point() else labels


def _loss_type(model: nn.Module) -> str | None:
    base = getattr(model, "get_base_model", lambda: model)()
    return getattr(base, "loss_type", None)


def _predicts_next(model: nn.Module) -> bool:
    """Whether the labels of a model are shifted by one inside it, as Transformers decides it."""
    return _loss_type(model) in (None, "ForCausalLM", "ForConditionalGeneration")
