"""How a call that one thread makes is ended by another: the asyncio client waits for threads, and may stop waiting."""

from __future__ import annotations

import contextvars
import threading
from typing import Any


class Stop:
    """Ends the call that one thread makes, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call: Any = None
        self._is_set = False

    def took(self, call: Any) -> None:
        """This is the call now."""
        with self._lock:
            self._call = call
            if self._is_set:
                call.cancel()

    def set(self) -> None:
        """Ends it, or as soon as it begins."""
        with self._lock:
            self._is_set = True
            if self._call is not None:
                self._call.cancel()


#: What may end the calls of this thread, where somebody waits for it who may stop waiting: see aio.py.
STOP: contextvars.ContextVar[Stop | None] = contextvars.ContextVar("esker_stop", default=None)
