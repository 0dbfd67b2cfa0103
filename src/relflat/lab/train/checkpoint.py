"""Checkpoints after an epoch: enough to go on as if nothing had happened, bit for bit.

The data order of an epoch follows from the seed and the epoch's number, so the number is all that has to be kept of
it. Weights are safetensors; the rest is a torch file read with ``weights_only=True``.
"""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from relflat.errors import DataError
from relflat.lab.common.sums import changed, sums
from relflat.lab.train import store
from relflat.lab.train.steps import get_counter, set_counter


def save(
    run: Path, *, epoch: int, model: nn.Module, criterion: nn.Module, history: list[dict[str, Any]], **parts: Any
) -> None:
    """Write the checkpoint of an epoch, with what else has a state, and then remove older ones."""
    state = {
        "criterion_step": get_counter(criterion),
        "rng": _rng_state(),
        "history": history,
        **{name: part.state_dict() for name, part in parts.items() if part is not None},
    }

    def fill(folder: Path) -> None:
        folder.mkdir()
        try:
            save_model(model, str(folder / store.WEIGHTS))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        content = io.BytesIO()  # torch.save into a file that fails ends in an error that does not say why
        torch.save(state, content)
        (folder / store.STATE).write_bytes(content.getbuffer())
        (folder / store.SUMS).write_text(sums(folder, (store.WEIGHTS, store.STATE)), "utf-8")

    store.put_in_place(run / f"checkpoint-{epoch:04d}", fill)
    remove_old(run)


def load(run: Path, *, model: nn.Module, criterion: nn.Module, **parts: Any) -> list[dict[str, Any]]:
    """Put everything back as the newest checkpoint has it; return the history, empty without a checkpoint."""
    found = checkpoints(run)
    if not found:
        return []
    load_weights(run, model)
    try:
        state = torch.load(found[-1] / store.STATE, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
    except Exception as error:  # torch.load and load_state_dict let through whatever damaged files raise
        raise store.damaged(found[-1] / store.STATE, error) from error
    set_counter(criterion, state["criterion_step"])
    _set_rng_state(state["rng"])
    return list(state["history"])


def load_weights(run: Path, model: nn.Module) -> None:
    """Load the weights of the newest checkpoint, which there must be, after comparing its files with their sums."""
    found = checkpoints(run)
    if not found:
        raise DataError(f"{run} has no checkpoint yet; train it first.")
    if changed(found[-1]):
        raise store.damaged(found[-1] / store.SUMS, "the files are others")
    read_weights(found[-1] / store.WEIGHTS, model)


def read_weights(path: Path, model: nn.Module) -> None:
    """Load a file of weights, which may turn out to be damaged."""
    try:
        load_model(model, str(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise store.damaged(path, " ".join(str(error).split())) from error


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; copies of them under other names do not count."""
    needed = (store.WEIGHTS, store.STATE)
    return [place for place in _numbered(run) if all((place / name).is_file() for name in needed)]


def _numbered(run: Path) -> list[Path]:
    """All folders with the name of a checkpoint, by number."""
    found = [place for place in run.glob("checkpoint-*") if store.CHECKPOINT.fullmatch(place.name)]
    return sorted(found, key=lambda place: int(place.name.rpartition("-")[2]))


def remove_old(run: Path) -> None:
    """Remove the files of all checkpoints but the newest complete one."""
    newest = checkpoints(run)[-1:]
    for old in _numbered(run):
        if old not in newest:
            store.remove_files(old, *store.CHECKPOINT_FILES)


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
