"""What becomes of processes that the code under test has forked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.waiting import wait_until


@contextmanager
def ended(child: int) -> Iterator[int]:
    """Wait until a child of this process has ended, and give its exit status. One that goes on is killed."""
    found: list[int] = []

    def gone() -> bool:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            found.append(os.waitstatus_to_exitcode(status))
        return bool(process)

    try:
        wait_until(gone, 10, what=f"the end of {child}")
        yield found[0]
    finally:
        if not found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
