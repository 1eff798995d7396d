"""What the tests of traces run in real workers."""

from __future__ import annotations

import sys

from tests.crash.gates import pass_gate
from worker import step, workflow

@step
async def pick(order: int) -> int:
    return order


@step
def pack(order: int) -> str:
    pass_gate("before-pack")
    return f"parcel {order}"


@step
def modules() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("opentelemetry"))


@workflow
async def ship(order: int) -> str:
    return pack(await pick(order))


@workflow
async def looking() -> list[str]:
    return modules()
