"""Who is told when configs may have changed."""

from __future__ import annotations

from collections.abc import Callable


class Event:
    """Something that happens now and then, and the callbacks that it calls."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def call(self, callback: Callable[[], None]) -> None:
        """From now on, each time."""
        self._callbacks.append(callback)

    def happened(self) -> None:
        for callback in self._callbacks:
            callback()


CONFIGS_CHANGED = Event()  # `find_config` may give another config than before
TABLES_CHANGED = Event()  # what was read of tables holds no longer
TABLES_CHANGED.call(CONFIGS_CHANGED.happened)


def on_change(callback: Callable[[], None]) -> None:
    """Call `callback` whenever `find_config` may give another config than before: whoever remembers launches
    forgets them then."""
    CONFIGS_CHANGED.call(callback)
