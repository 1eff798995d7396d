"""Gates: files that hold a step where it is to be struck. `Fleet.gate` closes them, and sees who stands there."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

HOME = Path(os.environ.get("STEPWELL_TEST_HOME", "."))
"""What the test and its workers share."""
GATE_SECONDS = 60.0


def closed(gate: str) -> bool:
    """Say that somebody stands at the gate; tell whether it is closed."""
    if not (HOME / f"closed-{gate}").exists():
        return False
    (HOME / f"reached-{gate}").touch()
    return True


def pass_gate(gate: str) -> None:
    """Wait in a thread until the gate is open."""
    deadline = time.monotonic() + GATE_SECONDS
    while closed(gate) and time.monotonic() < deadline:
        time.sleep(0.01)


async def pass_gate_async(gate: str) -> None:
    """Wait in the loop until the gate is open."""
    deadline = time.monotonic() + GATE_SECONDS
    while closed(gate) and time.monotonic() < deadline:  # noqa: ASYNC110 - a file opens it, from another process
        await asyncio.sleep(0.01)
