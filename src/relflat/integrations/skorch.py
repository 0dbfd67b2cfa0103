"""skorch: ``FAMMixin`` makes the arguments of FAM parameters of a net, for grid search too."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from relflat.fam import FAM
from relflat.integrations.common import extra, fam_for_computed_loss

with extra("skorch"):
    from skorch import NeuralNet

if TYPE_CHECKING:
    _Base = NeuralNet
else:
    _Base = object


class FAMMixin(_Base):  # type: ignore[misc, valid-type]  # skorch is not typed
    """Adds FAM's penalty to the training loss of a net; its arguments have the prefix ``fam__``, and none is needed.

    They are those of :class:`relflat.FAM` except ``radius`` and ``method="finite_difference"``; with a
    ``fam__strength`` the layer is ``"output"`` if none is named. They are ordinary skorch parameters: ``set_params``,
    cloning, grid search and pickling work. Validation loss, scores and predictions are those of the plain criterion.

    Example:
        >>> import torch
        >>> from skorch import NeuralNetClassifier
        >>> from sklearn.model_selection import GridSearchCV
        >>> class FAMClassifier(FAMMixin, NeuralNetClassifier):
        ...     pass
        >>> net = FAMClassifier(torch.nn.Linear, module__in_features=4, module__out_features=3,
        ...                     criterion=torch.nn.CrossEntropyLoss)
        >>> search = GridSearchCV(net, {"fam__size": [0.0, 0.002, 0.004]})
    """

    def initialize_criterion(self) -> Any:
        """Build the criterion, and FAM beside it; skorch calls this again when a parameter changes."""
        super().initialize_criterion()
        self.fam_ = self._new_fam()
        return self

    def _new_fam(self) -> FAM:
        options: dict[str, Any] = self.get_params_for("fam")
        if "strength" in options:
            options.setdefault("layer", "output")
        return fam_for_computed_loss(self.module_, options, f"{type(self).__name__}(fam__...)")

    def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Tensor:
        """Return the loss, plus the penalty in training."""
        loss = super().get_loss(y_pred, y_true, X=X, training=training)
        return loss + self.fam_.penalty(loss) if training else loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "fam_"):  # a copy watches no model: build one for the copied module
            step, training = self.fam_.step, self.fam_.training
            self.fam_ = self._new_fam().train(training)
            self.fam_.step = step
