"""What an error comes to on the command line: one sentence and an exit status. The only place that knows."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from outbox.errors import ResultTimeout, RunBlocked, RunCancelled, RunConflict, RunFailed, StepwellError

FAILED = 1
MISTAKE = 2

_ASKED_AND_FAILED = (RunFailed, RunCancelled, RunBlocked, RunConflict, ResultTimeout)


@dataclass(frozen=True, slots=True)
class Told:
    """What to say of an error, and the status to exit with."""

    sentence: str
    status: int


class Mistake(StepwellError):
    """What the caller of a command got wrong, where no error of the library says it."""


class Failed(StepwellError):
    """What was asked for and did not come about, through no mistake of the caller's."""


def told(error: Exception) -> Told | None:
    """Return what to say of `error`, None for one that only a traceback explains."""
    match error:
        case StepwellError():
            return Told(
                one_line(error), FAILED if isinstance(error, (Failed, *_ASKED_AND_FAILED)) else MISTAKE
            )
        case psycopg.errors.InsufficientPrivilege():
            said = error.diag.message_primary or one_line(error)
            return Told(
                f"this database role may not do that ({said}); grant it one of Stepwell's roles", FAILED
            )
        case psycopg.OperationalError():  # cannot be reached, refuses, restarts, is out of something
            return Told(f"the database cannot be used: {one_line(error)}", FAILED)
        case psycopg.DataError():
            return Told(
                f"the database refuses that: {error.diag.message_primary or one_line(error)}", MISTAKE
            )
    return None


def one_line(error: BaseException) -> str:
    """Return the message of `error` without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
