"""What an error comes to on the command line: one sentence and an exit status. The only place that knows."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from outbox.database import is_full
from outbox.errors import ResultTimeout, RunBlocked, RunCancelled, RunConflict, RunFailed, StepwellError

FAILED = 1
MISTAKE = 2

KEPT = "\n\u200c\u200d"  # the last two are invisible, but part of how names are written in several scripts

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
        case UnicodeEncodeError():  # of bytes that are no text Python makes half characters, which nobody takes
            return Told(f"{error.object[:80]!r} is not UTF-8", MISTAKE)
        case psycopg.errors.InsufficientPrivilege():
            said = error.diag.message_primary or one_line(error)
            return Told(
                f"this database role may not do that ({said}); grant it one of Stepwell's roles", FAILED
            )
        case psycopg.OperationalError() if is_full(error):
            return Told(
                f"the database has no connection left ({one_line(error)}); try again, or allow it more: docs/operations.md "
                "counts what workers and clients take",
                FAILED,
            )
        case psycopg.errors.ReadOnlySqlTransaction():
            said = error.diag.message_primary or one_line(error)
            return Told(
                f"the database takes no writes here ({said}): is it a standby, or does `show default_transaction_read_only` "
                "say on?",
                FAILED,
            )
        case psycopg.OperationalError():  # cannot be reached, refuses, restarts, is out of something
            return Told(f"the database cannot be used: {one_line(error)}", FAILED)
        case psycopg.DataError():
            return Told(
                f"the database refuses that: {error.diag.message_primary or one_line(error)}", MISTAKE
            )
    return None


def one_line(error: BaseException) -> str:
    """Return the message of `error` without line breaks, and fit for a terminal: it may quote what anybody has sent."""
    return spelled_out(" ".join(str(error).split())) or type(error).__name__


def spelled_out(text: str) -> str:
    """Return `text` with control and other invisible characters spelled out, so that they cannot drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in KEPT else c.encode("unicode_escape").decode() for c in text)
