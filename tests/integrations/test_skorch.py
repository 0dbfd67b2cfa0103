"""FAM in skorch: its arguments are parameters of the net, and everything scikit-learn does with those works."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tiny import assert_same, data, gradients, mlp, plain_gradient
from torch import nn

from relflat.errors import ConfigError, LayerError
from unbounded import FAM

skorch = pytest.importorskip("skorch")
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback

from relflat.integrations.skorch import FAMMixin


class FAMClassifier(FAMMixin, NeuralNetClassifier):
    pass


class FAMRegressor(FAMMixin, NeuralNetRegressor):
    pass


class Keep(Callback):
    def on_grad_computed(self, net, named_parameters, **kwargs):
        net.found_ = gradients(net.module_)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.hidden(x).tanh())


def arrays():
    x, y = data(torch.float32)
    return x.numpy(), y.numpy()


def classifier(module=Net, **options) -> FAMClassifier:
    settings = {"criterion": nn.CrossEntropyLoss, "lr": 0.1, "max_epochs": 2, "batch_size": -1, "verbose": 0}
    settings |= {"train_split": None, "fam__strength": 0.5, "fam__bound": None}
    return FAMClassifier(module, **(settings | options))


def test_gradients_are_those_of_the_full_batch() -> None:
    x, y = data()
    net = classifier(mlp(), max_epochs=1, callbacks=[Keep()]).fit(x, y)
    assert net.fam_.last["method"] == "closed_form"
    assert_same(net.found_, plain_gradient())


def test_strength_is_a_parameter_for_grid_search() -> None:
    x, y = (np.tile(a, (4, 1)) if a.ndim == 2 else np.tile(a, 4) for a in arrays())
    search = GridSearchCV(classifier(), {"fam__strength": [0.0, 0.1], "module__width": [4, 8]}, cv=2)
    search.fit(x, y)
    assert set(search.best_params_) == {"fam__strength", "module__width"}
    assert search.best_estimator_.fam_.strength == search.best_params_["fam__strength"]


def test_clone_and_set_params() -> None:
    net = classifier(fam__layer="hidden", fam__curvature="hessian")
    other = clone(net).set_params(fam__strength=0.25)
    assert other.get_params()["fam__layer"] == "hidden"
    assert net.get_params()["fam__strength"] == 0.5
    other.fit(*arrays())
    assert other.fam_.layers == ["hidden"]
    other.set_params(fam__strength=2.0)
    assert other.fam_.strength == 2.0
    other.partial_fit(*arrays())
    assert other.fam_.last["kappa"] != 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_go_on_training(copied) -> None:
    net = classifier(fam__layer="hidden", fam__seed=3).fit(*arrays())
    other = copied(net)
    np.testing.assert_array_equal(net.predict_proba(arrays()[0]), other.predict_proba(arrays()[0]))
    net.partial_fit(*arrays())
    other.partial_fit(*arrays())
    for a, b in zip(net.module_.parameters(), other.module_.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.fam_.step == net.fam_.step == 4


def test_validation_loss_is_plain_and_training_loss_has_the_penalty() -> None:
    x, y = arrays()
    net = classifier(max_epochs=1, lr=0.0, train_split=skorch.dataset.ValidSplit(2, stratified=False)).fit(x, y)
    model = copy.deepcopy(net.module_)
    plain = nn.functional.cross_entropy(model(torch.as_tensor(x[:8])), torch.as_tensor(y[:8])).item()
    valid = net.history[-1, "valid_loss"]
    halves = [plain, nn.functional.cross_entropy(model(torch.as_tensor(x[8:])), torch.as_tensor(y[8:])).item()]
    assert min(abs(valid - half) for half in halves) < 1e-6
    assert net.history[-1, "train_loss"] == pytest.approx(net.fam_.last["total"], rel=1e-6)
    assert net.fam_.last["penalty"] > 0


def test_regression() -> None:
    x, _ = data(torch.float32)
    y = x[:, :3].clone()
    net = FAMRegressor(
        Net, fam__strength=0.1, fam__bound=None, train_split=None, verbose=0, max_epochs=1, batch_size=-1
    ).fit(x, y)
    assert net.fam_.last["method"] == "closed_form"
    model = copy.deepcopy(net.module_)
    fam = FAM(nn.MSELoss(), model, "head", strength=0.1)
    fam(model(x), y)
    assert fam.last["kappa"] == pytest.approx(net.fam_.last["kappa"], rel=0.1)  # one step later


def test_bad_input() -> None:
    with pytest.raises(LayerError, match="head"):
        classifier(fam__layer="classifier").fit(*arrays())
    with pytest.raises(ConfigError, match="radius"):
        classifier(fam__radius=0.1).fit(*arrays())
