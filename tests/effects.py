"""What the steps of tests do to the world outside: stand at gates, write ledgers."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from tests.waiting import wait_until_async
from worker import current_step, step, workflow
from worker.definitions import Registry, Workflow, collecting


class Gate:
    """Where an execution stands until the test opens; usable from async steps and from threads."""

    def __init__(self) -> None:
        self.entered = 0
        self._open = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._opened = asyncio.Event()

    async def passed(self) -> None:
        self.entered += 1
        await self._opened.wait()

    def passed_in_thread(self) -> None:
        self.entered += 1
        assert self._open.wait(30), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()
        self._opened.set()

    async def reached(self, times: int = 1) -> None:
        await wait_until_async(lambda: self.entered >= times, what=f"{times} executions at the gate")


class Ledger(list[tuple[str, int, str]]):
    """What has taken effect outside of the database: (step, execution, idempotency key)."""

    def note(self, name: str) -> None:
        info = current_step()
        self.append((name, info.execution, info.idempotency_key.partition(":")[2]))

    @property
    def names(self) -> str:
        return "".join(name for name, _, _ in self)


def two_steps(gate: Gate, executed: list[str]) -> tuple[Registry, Workflow[..., Any]]:
    """Return a workflow whose async first step stands at the gate."""
    with collecting() as registry:

        @step
        async def first() -> None:
            executed.append("first")
            await gate.passed()

        @step
        async def second() -> str:
            executed.append("second")
            return "done"

        @workflow
        async def two() -> str:
            await first()
            return await second()

    return registry, two
