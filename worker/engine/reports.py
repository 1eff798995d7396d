"""What a person is told of a run that has failed or is blocked."""

from __future__ import annotations

import logging
from uuid import UUID

from outbox.codec import encode_fault
from outbox.errors import PayloadError
from outbox.faults import qualified_name
from worker.engine.transitions import EndRow
from worker.replay.decisions import Block, DoStep
from worker.replay.records import dotted

logger = logging.getLogger(__name__)

LONG_HISTORY = 10_000


def log_end(run_id: UUID, workflow: str, end: EndRow) -> None:
    """Log an end that is not the good one, by the type of its error: the message may hold payload."""
    if end.state in ("failed", "blocked"):
        level = logging.ERROR if end.state == "blocked" else logging.INFO  # an error needs a person
        kind = (end.error or {}).get("type", "no error")
        logger.log(level, "run %s of %s %s: %s", run_id, workflow, _IS[end.state], kind)


def log_growth(run_id: UUID, workflow: str, before: int, records: int) -> None:
    """Warn of a history that grows, before it hurts: each time that it has so many records more."""
    if records >= LONG_HISTORY and records // LONG_HISTORY > max(0, before) // LONG_HISTORY:
        logger.warning(
            "run %s of %s has %d records, and every wake replays them: let it start anew with continue_as(…)",
            run_id,
            workflow,
            records,
        )


def log_unwritable(run_id: UUID) -> None:
    """Tell that a run cannot even be blocked."""
    logger.error("the database refuses even the end of a run", extra={"run_id": str(run_id)})


def kind_of(error: BaseException) -> str:
    """Return what sort of an error of the database it is. Its message may hold payload: SQLAlchemy's has the parameters."""
    original = getattr(error, "orig", None) or error
    state = getattr(original, "sqlstate", None)
    return qualified_name(type(original)).rpartition(".")[2] + (f" (SQLSTATE {state})" if state else "")


_IS = {"failed": "has failed", "blocked": "is blocked"}


def held(step: DoStep) -> Block:
    """Report an interrupted step with ``on_crash="hold"``."""
    return _blocked(
        "held after an interruption",
        "Held",
        f"step {step.step.name} at {dotted(step.path)} was interrupted and may have taken effect; find out, then say how "
        f"it ended (`stepwell runs resolve RUN {dotted(step.path)} --value JSON`), or retry the run to execute it again",
    )


def ended_transaction(step: DoStep) -> Block:
    """Report a transactional step that has ended its transaction itself."""
    return _blocked(
        "the step ended its transaction",
        "TransactionEnded",
        f"step {step.step.name} ended the transaction that it was given (a COMMIT or ROLLBACK of its own), so its "
        "writes could not be bound to its completion; look at what it wrote, remove the statement, then retry the run",
    )


def refused(message: str) -> Block:
    """Report data that the database refuses to record."""
    return _blocked("the database refuses the data", "DataRefused", message)


def too_large(what: str, size: int, limit: int, advice: str) -> Block:
    """Report a payload that has more bytes than this worker reads, which came by SQL."""
    return Block(
        f"a payload is too large: {what}",
        encode_fault(
            PayloadError(
                f"{what}: not read, for it has {size:,} bytes as JSON, and the limit of this worker (max_payload_bytes) is "
                f"{limit:,}; {advice}"
            )
        ),
    )


def bug(error: Exception) -> Block:
    """Report a failure of Stepwell itself."""
    return Block("Stepwell failed", encode_fault(error))


def _blocked(reason: str, type_: str, message: str) -> Block:
    return Block(reason, {"type": type_, "message": message})
