"""User code that forks, and whose child comes back to us.

`os.fork()` and `sys.exit()` is how a program detaches something. Here the exit would be taken for a failure, and the
child go on as a second worker: without the threads of the first, on the same sessions of the database, and for ever.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import TracebackType


class ForksEnd:
    """Ends a process that was forked inside of this block when it leaves it, by what it raises as Python would."""

    __slots__ = ("_process",)

    def __enter__(self) -> None:
        self._process = os.getpid()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:
            _end(error)


def _end(error: BaseException | None) -> None:
    """End this process without a word to anybody else: no session is closed, no exit handler of the parent's is run."""
    status = 0 if error is None else 1
    if isinstance(error, SystemExit):
        status = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
