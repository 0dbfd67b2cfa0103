"""Hooks on modules that neither keep their owner alive nor outlive it."""

import weakref
from typing import Any


class WeakHook:
    """A hook that knows its owner weakly, and is inert in copies of the module it sits on."""

    def __init__(self, owner: Any, method: str, *args: Any) -> None:
        self._owner = weakref.ref(owner) if owner is not None else lambda: None
        self._method, self._args = method, args

    def __call__(self, *args: Any) -> Any:
        """Call the owner's method, if it is alive."""
        owner = self._owner()
        return getattr(owner, self._method)(*self._args, *args) if owner is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, (None, self._method, *self._args)


def remove(handles: dict[str, list[Any]]) -> None:
    """Remove hooks by their handles, and forget those."""
    while handles:
        for handle in handles.popitem()[1]:
            handle.remove()
