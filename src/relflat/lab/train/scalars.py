"""The numbers of ``metrics.jsonl`` as TensorBoard scalars."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Scalars:
    """Writes scalars into ``<run>/tensorboard``; does nothing when not active."""

    def __init__(self, run: Path, done: int, *, active: bool) -> None:
        self._writer: Any = None
        if active:
            from torch.utils.tensorboard import SummaryWriter

            # what an interrupted run wrote after its last checkpoint is dropped on resuming
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Add one epoch's numbers."""
        if self._writer is None:
            return
        for name, value in record.items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
