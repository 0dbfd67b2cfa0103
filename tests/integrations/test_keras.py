"""Keras on torch: the gradients are those of FAM in plain PyTorch, and everything but training is plain."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from torch import nn

from relflat import ConfigError, LayerError, LossError
from unbounded import FAM

if importlib.util.find_spec("keras") is None:
    pytest.skip("keras is not installed: pip install 'relflat[keras]'", allow_module_level=True)

X = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(3, size=24)


@pytest.fixture(scope="module")
def kit():
    """Keras and the integration; imported here, as importing takes seconds and other tests do not need it."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    from relflat.integrations import keras as integration

    class FAMSequential(integration.FAMMixin, keras.Sequential):
        pass

    class FAMModel(integration.FAMMixin, keras.Model):
        pass

    integration.keras, integration.FAMSequential, integration.FAMModel = keras, FAMSequential, FAMModel
    return integration


def build(kit, head="dense", activation=None):
    keras = kit.keras
    keras.utils.set_random_seed(1)
    last = keras.layers.Dense(3, name="logits", activation=activation)
    if head == "wrapped":
        last = keras.layers.TorchModuleWrapper(nn.Linear(8, 3), name="logits")
    layers = [keras.Input((6,)), keras.layers.Dense(8, activation="tanh", name="hidden"), last]
    return kit.FAMSequential(layers)


def compiled(kit, model, loss=None, rate=0.5, **fam):
    fam = {"layer": "output", "strength": 0.2, "bound": None} | fam
    loss = kit.TorchLoss(nn.CrossEntropyLoss()) if loss is None else loss
    model.compile(optimizer=kit.keras.optimizers.SGD(rate), loss=loss, fam=fam)
    return model


def twin(model):
    """The same network in PyTorch."""
    arrays = [torch.from_numpy(w.copy()) for w in model.get_weights()]
    arrays = [a if a.ndim < 2 or len(a) in (6, 8) else a.mT for a in arrays]
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p, a in zip(net.parameters(), arrays, strict=True):
            p.copy_(a.mT if a.ndim == 2 else a)
    return net


def assert_same_weights(model, net):
    for a, p in zip([x.detach() for x in twin(model).parameters()], net.parameters(), strict=True):
        torch.testing.assert_close(a, p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["dense", "wrapped"])
@pytest.mark.parametrize(
    ("layer", "names"), [("output", ["2"]), ("logits", ["2"]), (["hidden", "logits"], ["0", "2"])]
)
def test_training_is_that_of_pytorch(kit, head, layer, names):
    """Three steps with random probes for the hidden layer, which depend on the step."""
    model = build(kit, head)
    net = twin(model)
    compiled(kit, model, layer=layer, seed=4).fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    criterion = FAM(nn.CrossEntropyLoss(), net, names, strength=0.2, seed=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for x, y in zip(torch.from_numpy(X).split(8), torch.from_numpy(Y).split(8), strict=True):
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()
    assert model.criterion.last["method"] == criterion.last["method"]
    assert model.criterion.last["kappa"] == pytest.approx(criterion.last["kappa"], rel=1e-4)
    assert criterion.last["penalty"] > 0.01
    assert_same_weights(model, net)


def test_losses_of_keras_give_the_same_by_differentiation(kit):
    """Also on probabilities: the layer's outputs are what its activation sees."""
    crossentropy = kit.keras.losses.SparseCategoricalCrossentropy
    found = []
    for activation, loss, method in (
        (None, None, "auto"),
        (None, crossentropy(from_logits=True), "exact"),
        ("softmax", crossentropy(), "exact"),
        ("softmax", "sparse_categorical_crossentropy", "exact"),
    ):
        model = build(kit, activation=activation)
        compiled(kit, model, loss, curvature="hessian", method=method)
        model.fit(X, Y, batch_size=24, verbose=0)
        found.append(model.criterion.last)
    assert [x["method"] for x in found] == ["closed_form", *["exact"] * 3]
    for other in found[1:]:
        assert other["kappa"] == pytest.approx(found[0]["kappa"], rel=1e-3)


def test_functional_models_and_own_train_steps(kit):
    inputs = kit.keras.Input((6,))
    hidden = kit.keras.layers.Dense(8, activation="relu")(inputs)
    outputs = kit.keras.layers.Dense(3, name="logits")(hidden)

    class Own(kit.FAMModel):
        def train_step(self, data):
            self.steps = getattr(self, "steps", 0) + 1
            return super().train_step(data)

    model = compiled(kit, Own(inputs, outputs))
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    assert model.steps == 6
    assert model.criterion.step == 6
    assert model.criterion.last["penalty"] > 0


def test_all_but_training_is_plain(kit):
    model = compiled(kit, build(kit))
    before = model.predict(X, verbose=0)
    model.fit(X, Y, verbose=0, validation_data=(X, Y), epochs=2, batch_size=24)
    logs = model.fit(X, Y, verbose=0, validation_data=(X, Y), batch_size=24).history
    plain = nn.functional.cross_entropy(torch.from_numpy(model.predict(X, verbose=0)), torch.from_numpy(Y))
    assert logs["val_loss"][0] == pytest.approx(float(plain), rel=1e-5)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(float(plain), rel=1e-5)
    assert logs["loss"][0] == pytest.approx(model.criterion.last["total"], rel=1e-5)
    assert [w.path.split("/")[-1] for w in model.weights] == ["kernel", "bias"] * 2
    assert not np.allclose(before, model.predict(X, verbose=0))


def test_a_saved_model_trains_on(kit, tmp_path):
    """The same steps as without interruption, probes included; FAM is part of how it is compiled."""
    loss = "sparse_categorical_crossentropy"
    model = compiled(kit, build(kit, activation="softmax"), loss, layer="hidden", seed=3)
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = kit.keras.models.load_model(tmp_path / "model.keras", custom_objects={"FAMSequential": kit.FAMSequential})
    for one in (model, again):
        one.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert again.criterion.step == 6
    assert again.criterion.last["kappa"] == pytest.approx(model.criterion.last["kappa"], rel=1e-5)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_compiling_again_changes_the_options_or_removes_fam(kit):
    model = compiled(kit, build(kit), strength=0.1)
    model.fit(X, Y, verbose=0, batch_size=24)
    compiled(kit, model, strength=0.3).fit(X, Y, verbose=0, batch_size=24)
    assert model.criterion.strength == 0.3
    model.compile(optimizer="sgd", loss=kit.TorchLoss(nn.CrossEntropyLoss()))
    plain = float(nn.functional.cross_entropy(model(X), torch.from_numpy(Y)).detach())
    assert model.fit(X, Y, verbose=0, batch_size=24).history["loss"][0] == pytest.approx(plain, rel=1e-5)
    assert model.criterion is None


def test_mixed_precision_computes_kappa_from_the_copied_weights(kit):
    kit.keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = compiled(kit, build(kit))
    finally:
        kit.keras.config.set_dtype_policy("float32")
    wide = compiled(kit, build(kit))
    for one in (model, wide):
        one.fit(X, Y, verbose=0, batch_size=24)
    assert model.criterion.last["method"] == "closed_form"
    assert model.criterion.last["kappa"] == pytest.approx(wide.criterion.last["kappa"], rel=3e-2)
    assert all(v.value.dtype == torch.float32 for v in model.trainable_variables)
    for a, b in zip(model.get_weights(), wide.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2)


class TestBadInput:
    def test_layer_not_found(self, kit):
        with pytest.raises(LayerError, match=r"'logit'; did you mean 'logits'.*\['hidden', 'logits'\]"):
            compiled(kit, build(kit), layer="logit").fit(X, Y, verbose=0)

    def test_options(self, kit):
        with pytest.raises(ConfigError, match="name the layer"):
            build(kit).compile(loss="mse", fam={"strength": 0.5})
        with pytest.raises(ConfigError, match=r"radius=0\.1"):
            compiled(kit, build(kit), radius=0.1).fit(X, Y, verbose=0)
        with pytest.raises(ConfigError, match="jit_compile"):
            build(kit).compile(loss="mse", jit_compile=True, fam={"layer": "output", "strength": 1.0, "bound": None})

    def test_sample_weights(self, kit):
        with pytest.raises(LossError, match="no sample weights"):
            compiled(kit, build(kit)).fit(X, Y, sample_weight=np.ones(24), verbose=0)

    def test_other_backend(self, kit, monkeypatch):
        monkeypatch.setattr(kit.keras.backend, "backend", lambda: "numpy")
        spec = importlib.util.find_spec("relflat.integrations.keras")
        with pytest.raises(ImportError, match="needs the torch backend of Keras, and it runs on 'numpy'"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
