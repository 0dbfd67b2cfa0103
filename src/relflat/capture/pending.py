"""Forward passes that wait for their criterion call."""

from relflat.capture.calls import Forward
from relflat.errors import GraphError

_MOST = 8


class Pending:
    """A queue of recorded passes: each call of the criterion takes all of them."""

    def __init__(self) -> None:
        self.clear()

    def __len__(self) -> int:
        return len(self._records)

    def clear(self) -> None:
        """Forget all, and that there were any."""
        self._records: list[Forward] = []
        self._overflow = self._used = False

    def put(self, record: Forward) -> None:
        """Add a pass; when too many wait they are dropped, and the next :meth:`take` says so."""
        if len(self._records) == _MOST:
            self._records, self._overflow = [], True
        self._records.append(record)
        self._used = False

    def take(self, model: str) -> list[Forward]:
        """Hand over the passes since the last call, oldest first.

        Raises:
            GraphError: there is none, or too many were left unused; names the class of the model.
        """
        records, overflow, used = self._records, self._overflow, self._used
        self._records, self._overflow, self._used = [], False, used or bool(self._records)
        if overflow:
            raise GraphError(
                f"more than {_MOST} training forward passes since the criterion was last called, so "
                "the older ones were dropped; call it once after each, run unused ones under "
                "torch.no_grad() with model.eval(), or call its reset() first"
            )
        if not records:
            why = (
                "an earlier call used the last one; run the model again before each call, or add the losses and "
                "call the criterion once"
                if used
                else f"call the model ({model}, as given to FAM, in training mode and not one of its parts) first, "
                "and the criterion once after it"
            )
            raise GraphError(f"no training forward pass to go with this criterion call: {why}")
        return records
