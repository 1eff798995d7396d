"""Let Ctrl-C, SIGTERM and a closed terminal end the demo at points where nothing is half started."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_EVERY_SECONDS = 0.05


class Interrupted(Exception):
    """The demo was told to end, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Interruption:
    """Note the signals while it is entered; `check` and `sleep` raise Interrupted, nothing else does.

    So what takes things down at the end is not interrupted in its turn.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until a signal comes, which raises Interrupted."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, LOOK_EVERY_SECONDS))
        self.check()

    def wait(self) -> None:
        """Return when a signal comes."""
        while self.number is None:
            time.sleep(LOOK_EVERY_SECONDS)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
