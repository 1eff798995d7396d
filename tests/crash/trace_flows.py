"""What the tests of traces, logs and hooks run in real workers. Hooks write what they are told to a file."""

from __future__ import annotations

import json
import logging
import os
import sys

from tests.crash.gates import HOME, pass_gate
from worker import events, on_event, step, workflow

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


@on_event
def note(event: events.Event) -> None:
    told = {
        "event": type(event).__name__,
        "pid": os.getpid(),
        "worker": event.worker,
        "step": getattr(event, "step", None),
        "execution": getattr(event, "execution", None),
        "state": getattr(event, "state", None),
        "dead": getattr(event, "dead", None),
        "detector": getattr(event, "detector", None),
        "tasks": getattr(event, "tasks", None),
        "trace_id": getattr(event, "trace_id", None),
    }
    descriptor = os.open(HOME / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, json.dumps(told).encode() + b"\n")
    finally:
        os.close(descriptor)


@on_event
def failing(event: events.Event) -> None:
    raise RuntimeError("this hook is broken")
