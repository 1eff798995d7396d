"""Tell events to the hooks of a process, without ever waiting for them.

One thread for each engine that has hooks calls them, one event after the other. `tell` may be called from any thread; it
never waits and never raises: what finds `MOST_WAITING` events before it is dropped, and how many were is logged once the
hooks have caught up. What a hook raises is logged, and the others are called all the same. The thread is a daemon: a hook
that never returns keeps no process from ending.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from worker.events import Event
from worker.steps.forks import ForksEnd

logger = logging.getLogger(__name__)

MOST_WAITING = 1000


class Hooks:
    """Calls `hooks` with what is told, until it is closed."""

    def __init__(self, hooks: Sequence[Callable[[Event], object]]) -> None:
        self._hooks = tuple(hooks)
        self._waiting: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._closed = False
        self._thread: Final = threading.Thread(target=self._run, name="stepwell events", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Have the hooks called with an event, soon."""
        if self._closed:
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float) -> None:
        """Tell what waits, for so long at most, and end the thread. Safe twice."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + seconds
        others = 0
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=seconds)
            others = 1
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            left = max(0, self._dropped + self._waiting.qsize() - others)
            logger.warning("hooks for events are too slow: at the end %d events were not told", left)

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            for hook in self._hooks:
                self._call(hook, event)
            if self._dropped and self._waiting.empty():
                dropped, self._dropped = self._dropped, 0
                with contextlib.suppress(Exception):
                    logger.warning("hooks for events are too slow: %d events were dropped", dropped)

    @staticmethod
    def _call(hook: Callable[[Event], object], event: Event) -> None:
        try:
            with ForksEnd():
                hook(event)
        except BaseException:  # user code: SystemExit must not end the thread
            # Nor must what writes logs, which may be APP's.
            with contextlib.suppress(Exception):
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                logger.warning("the hook %s failed at %s", name, type(event).__name__, exc_info=True)
