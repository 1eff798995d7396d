"""What is said of a run that is blocked by its body: the reason in a few words, and the fault with the details."""

from __future__ import annotations

from typing import Any

from outbox.codec import encode_fault
from outbox.errors import HistoryMismatch, NotDeterministic
from outbox.faults import qualified_name
from worker.replay.calls import Misfit


def reason_of(violation: BaseException) -> str:
    """Return why the run is blocked, in a few words."""
    if isinstance(violation, Misfit):
        return "recorded result cannot be decoded"
    if isinstance(violation, HistoryMismatch):
        return "history mismatch"
    if isinstance(violation, NotDeterministic):
        return "not deterministic"
    return f"the body raised {type(violation).__name__}"


def fault_of(error: BaseException) -> dict[str, Any]:
    """Return the fault of a verdict. Ours name the line of the body; where in Stepwell we noticed helps nobody."""
    fault = encode_fault(error)
    if isinstance(error, HistoryMismatch | NotDeterministic):
        fault.pop("trace", None)
    if isinstance(error, HistoryMismatch):
        fault["type"] = qualified_name(HistoryMismatch)
        fault["data"] = {"expected": error.expected, "got": error.got}
    return fault


def named(yielded: Any) -> str:
    """Return what a body has awaited that Stepwell does not know."""
    if yielded is None:
        return "a bare yield to the event loop (as asyncio.sleep(0) does)"
    kind = type(yielded)
    return f"{kind.__module__}.{kind.__qualname__}"
