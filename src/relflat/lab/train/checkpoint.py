"""Checkpoints after an epoch: enough to go on as if nothing had happened, bit for bit.

The data order of an epoch follows from the seed and the epoch's number, so the number is all that has to be kept of
it. Weights are safetensors; the rest is a torch file read with ``weights_only=True``.
"""

import io
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from relflat.errors import DataError
from relflat.lab.train.session import Session
from relflat.lab.train.steps import get_counter, set_counter
from relflat.lab.train.store import put_in_place

WEIGHTS, STATE = "model.safetensors", "state.pt"


def save(run: Path, session: Session, history: list[dict[str, Any]]) -> None:
    """Write the checkpoint of the last epoch in the history, then remove older ones; an OSError leaves those."""
    state = {
        "criterion_step": get_counter(session.learner.criterion),
        "rng": _rng_state(),
        "history": history,
        **{name: part.state_dict() for name, part in _parts(session).items()},
    }

    def fill(folder: Path) -> None:
        folder.mkdir()
        try:
            save_model(session.model, str(folder / WEIGHTS))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        content = io.BytesIO()  # torch.save into a file that fails ends in an error that does not say why
        torch.save(state, content)
        (folder / STATE).write_bytes(content.getbuffer())

    put_in_place(run / f"checkpoint-{len(history):04d}", fill)
    remove_old(run)


def load(run: Path, session: Session) -> list[dict[str, Any]]:
    """Put everything back as the newest checkpoint has it; return the history, empty without a checkpoint."""
    found = checkpoints(run)
    if not found:
        return []
    try:
        state = torch.load(found[-1] / STATE, weights_only=True, map_location="cpu")
        load_model(session.model, str(found[-1] / WEIGHTS))
        for name, part in _parts(session).items():
            part.load_state_dict(state[name])
    except Exception as error:  # torch.load and load_state_dict let through whatever damaged files raise
        raise DataError(f"The checkpoint {found[-1]} cannot be read ({error}). Run again with --fresh.") from error
    set_counter(session.learner.criterion, state["criterion_step"])
    _set_rng_state(state["rng"])
    return list(state["history"])


def _parts(session: Session) -> dict[str, Any]:
    """What keeps a state of its own between epochs, beside the model."""
    parts = {"optimizer": session.learner.optimizer, "scheduler": session.scheduler}
    scaler = session.accelerator.scaler
    return parts if scaler is None else {**parts, "scaler": scaler}


def load_weights(run: Path, model: nn.Module) -> None:
    """Load the weights of the newest checkpoint, which there must be."""
    found = checkpoints(run)
    if not found:
        raise DataError(f"{run} has no checkpoint yet; train it first.")
    load_model(model, str(found[-1] / WEIGHTS))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-*"))


def remove_old(run: Path) -> None:
    """Remove all checkpoints but the newest."""
    for old in checkpoints(run)[:-1]:
        shutil.rmtree(old)


def _rng_state() -> dict[str, Any]:
    """State of the global generators of torch, CUDA, NumPy and Python as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
