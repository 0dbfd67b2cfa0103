"""A run stopped in mid-epoch and resumed is bitwise the run that was not: probes, warm-up and ``every`` in use."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from test_transformers import arguments, build, rows
from tiny import SAMPLES, assert_bitwise, data, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unbounded import FAM

FAM_OPTIONS = {"strength": 0.5, "bound": None, "probes": 2, "warmup_steps": 9, "every": 2}


# -- plain loop ----------------------------------------------------------------------------------------------


def plain(until: int, state: dict | None = None) -> tuple[nn.Module, dict]:
    model = mlp()
    criterion = FAM(nn.CrossEntropyLoss(), model, "0", seed=3, **FAM_OPTIONS)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = 0
    if state is not None:
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        criterion.step = first  # all the state there is
    x, y = data()
    for step in range(first, until):
        pick = slice(step % 4 * 4, step % 4 * 4 + 4)
        optimizer.zero_grad()
        criterion(model(x[pick]), y[pick]).backward()
        optimizer.step()
    if until % 2:
        assert criterion.last["method"] == "probe(ggn, 2)"
    state = {"step": until, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return model, state


def test_plain_loop() -> None:
    _, state = plain(6)
    torch.manual_seed(99)
    resumed, _ = plain(13, state)
    whole, _ = plain(13)
    assert_bitwise(resumed, whole)


# -- Lightning -----------------------------------------------------------------------------------------------


class Resumable(DataLoader):
    """A loader that knows where it is, as Lightning needs to resume inside an epoch."""

    def __init__(self) -> None:
        super().__init__(TensorDataset(*data()), batch_size=4)
        self.at = 0

    def __iter__(self):
        batches = list(super().__iter__())
        while self.at < len(batches):
            self.at += 1
            yield batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path, accumulate) -> None:
    pytest.importorskip("lightning.pytorch")
    from test_lightning import Module, trainer

    from relflat.integrations.lightning import FAMCallback

    def run(steps: int, seed: int, checkpoint: Path | None = None):
        torch.manual_seed(seed)  # by default the seed of the probes, kept in the checkpoint
        callback, module = FAMCallback("net.0", **FAM_OPTIONS), Module()
        torch.manual_seed(seed)
        fitting = trainer(callback, max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate)
        fitting.fit(module, Resumable(), ckpt_path=checkpoint, weights_only=False)
        return module, fitting, callback

    _, stopped, callback = run(7, seed=5)
    assert callback.state_dict() == {"step": 7 * accumulate, "seed": 5}
    stopped.save_checkpoint(tmp_path / "mid.ckpt")
    resumed, _, again = run(13, seed=6, checkpoint=tmp_path / "mid.ckpt")
    whole, _, callback = run(13, seed=5)
    assert again.state_dict() == callback.state_dict()
    assert_bitwise(resumed, whole)
    other, _, _ = run(13, seed=6)
    assert not torch.equal(other.net[0].weight, whole.net[0].weight)


# -- Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore_callbacks", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(tmp_path, accumulate, restore_callbacks) -> None:
    pytest.importorskip("transformers")
    from relflat.integrations.transformers import FAMTrainer

    fam = FAM_OPTIONS | {"layer": "bert.encoder.layer.0.output.dense"}

    def run(folder: Path, checkpoint: Path | None = None, train: bool = True):
        args = arguments(
            folder, accumulate, max_steps=13, per_device_train_batch_size=4 // accumulate, save_strategy="steps",
            save_steps=6, restore_callback_states_from_checkpoint=restore_callbacks, optim="adamw_torch",
            learning_rate=1e-3,
        )  # fmt: skip
        trainer = FAMTrainer(build("tokens"), args, train_dataset=rows("tokens"), fam=fam)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.criterion.step == 13 * accumulate
        if accumulate == 1:  # the last call is one with a penalty
            assert trainer.criterion.last["method"] == "probe(ggn, 2)"
        return trainer.model

    assert 6 * 4 % SAMPLES  # step 6 is in the middle of an epoch
    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert_bitwise(resumed, whole)


# -- Accelerate ----------------------------------------------------------------------------------------------


def test_accelerate(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from relflat.integrations.accelerate import prepare_fam

    def run(steps: int, load: Path | None = None):
        accelerator = accelerate.Accelerator(cpu=True)
        model = mlp()
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
        criterion = prepare_fam(accelerator, nn.CrossEntropyLoss(), model, "0", seed=3, **FAM_OPTIONS)
        if load is not None:
            accelerator.load_state(load)
        x, y = data()
        while criterion.step < steps:
            pick = slice(criterion.step % 4 * 4, criterion.step % 4 * 4 + 4)
            optimizer.zero_grad()
            accelerator.backward(criterion(model(x[pick]), y[pick]))
            optimizer.step()
        return model, accelerator

    _, stopped = run(6)
    stopped.save_state(tmp_path / "state")
    resumed, _ = run(13, tmp_path / "state")
    whole, _ = run(13)
    assert_bitwise(resumed, whole)
