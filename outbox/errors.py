"""Everything that Stepwell raises, and what users raise to steer it.

::

    Exception
    ├── StepwellError            whatever Stepwell itself has to say
    │   ├── ConfigError          a setting, a definition or an APP that cannot work
    │   ├── SchemaError          the database lacks the schema, or has an older one
    │   ├── PayloadError         a value that cannot be carried, or does not fit its annotation
    │   ├── UnknownWorkflow      no such workflow is registered
    │   ├── RunNotFound          no such run
    │   ├── RunConflict          the run's state does not allow what was asked
    │   ├── RunFailed            the run ended with an error
    │   ├── RunCancelled         the run was cancelled
    │   ├── RunBlocked           the run needs a person
    │   ├── ResultTimeout        the run has not ended in the time that was given; it goes on
    │   ├── StepFailed           what a body sees of a step that failed
    │   └── DeadlineExceeded     the run's deadline has passed
    ├── Permanent                raised in a step: do not try again
    └── RetryAfter               raised in a step: try again, but not before so many seconds

    BaseException                control flow: no ``except Exception`` in a body may swallow these
    ├── Suspended                thrown into a body that is parked or discarded
    ├── Cancelled                thrown into a body or a step whose run is cancelled
    ├── HistoryMismatch          the body does not fit its recorded history
    └── NotDeterministic         the body did something that a replay could not repeat
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID


class StepwellError(Exception):
    """Base of every error that Stepwell raises."""


class ConfigError(StepwellError):
    """A setting, a definition or an APP that cannot work."""


class SchemaError(StepwellError):
    """The database lacks Stepwell's schema, or has one that is too old."""


class PayloadError(StepwellError):
    """A value that cannot be carried, or that does not fit the annotation it is decoded by.

    `field` is where inside the value: ``lead.emails[2]``, or empty for the value as a whole.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownWorkflow(StepwellError):
    """No workflow of this name is registered."""


class RunNotFound(StepwellError):
    """No run has this id."""


class RunConflict(StepwellError):
    """The state of the run does not allow what was asked of it."""


class _RunEnded(StepwellError):
    """A run that did not succeed. `error` is the recorded fault: type, message, data, trace."""

    _ending = ""
    _advice = ""

    def __init__(self, run_id: UUID | str, error: Mapping[str, Any] | None = None) -> None:
        self.run_id = run_id
        self.error = dict(error) if error is not None else None
        super().__init__(
            f"run {run_id} {self._ending}{_cause(self.error)}{self._advice.format(run_id=run_id)}"
        )


class RunFailed(_RunEnded):
    """The run ended with an error."""

    _ending = "failed"


class RunCancelled(_RunEnded):
    """The run was cancelled."""

    _ending = "was cancelled"


class RunBlocked(_RunEnded):
    """The run needs a person: it neither goes on nor ends by itself."""

    _ending = "is blocked"
    _advice = "; after the fix, `stepwell runs retry {run_id}` resumes it"


class ResultTimeout(StepwellError):
    """The run has not ended in the time that was given. The run itself goes on."""


class StepFailed(StepwellError):
    """A step failed: what a body sees of it, live and in every replay alike.

    `type` is the qualified name of the class that the step raised, `data` its encodable form or None.
    """

    def __init__(self, type: str, message: str, data: Any = None) -> None:
        super().__init__(f"{type}: {message}" if message else type)
        self.type = type
        self.message = message
        self.data = data


class DeadlineExceeded(StepwellError):
    """The deadline of the run has passed."""


class Permanent(Exception):
    """Raise in a step when trying again cannot help."""


class RetryAfter(Exception):
    """Raise in a step to be tried again no sooner than after `seconds` (or a `timedelta`).

    It sets the wait of this one retry; how often a step is tried stays with its policy.
    """

    def __init__(self, seconds: float | timedelta, message: str = "") -> None:
        self.seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else float(seconds)
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"RetryAfter takes a number of seconds that is not negative, got {seconds!r}")
        super().__init__(message or f"asks to be tried again after {self.seconds:g} s")


class Suspended(BaseException):
    """Thrown into a body that is parked or discarded, so that it unwinds. Let it pass."""


class Cancelled(BaseException):
    """Thrown into a body or a step whose run has been cancelled. Clean up and let it pass."""


class HistoryMismatch(BaseException):
    """The body does not fit its recorded history. Its run is blocked, with what was expected and what came."""

    def __init__(self, message: str, *, expected: str | None = None, got: str | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.got = got


class NotDeterministic(BaseException):
    """The body did something that a replay could not repeat, such as I/O of its own. Its run is blocked."""


def _cause(error: Mapping[str, Any] | None) -> str:
    """Return ': type: message' of a recorded fault, as far as it has them."""
    said = [str(error[part]) for part in ("type", "message") if error.get(part)] if error else []
    return "".join(f": {part}" for part in said)
