"""What the tests of traces and logs run in real workers."""

from __future__ import annotations

import logging
import sys

from tests.crash.gates import pass_gate
from worker import step, workflow

logger = logging.getLogger("shop")


@step
async def pick(order: int) -> int:
    logger.info("picked %d", order)
    return order


@step
def pack(order: int) -> str:
    logger.warning("packing", extra={"order": order})
    pass_gate("before-pack")
    return f"parcel {order}"


@step
def modules() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("opentelemetry"))


@workflow
async def ship(order: int) -> str:
    logger.info("shipping")
    return pack(await pick(order))


@workflow
async def looking() -> list[str]:
    return modules()
