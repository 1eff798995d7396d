from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest

from outbox import errors

RUN = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


@pytest.mark.parametrize(
    "name",
    [
        "ConfigError",
        "SchemaError",
        "PayloadError",
        "UnknownWorkflow",
        "RunNotFound",
        "RunConflict",
        "RunFailed",
        "RunCancelled",
        "RunBlocked",
        "ResultTimeout",
        "StepFailed",
        "DeadlineExceeded",
    ],
)
def test_whatever_stepwell_says_is_a_stepwell_error(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.StepwellError)


@pytest.mark.parametrize("name", ["Suspended", "Cancelled", "HistoryMismatch", "NotDeterministic"])
def test_control_flow_passes_an_except_exception(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, BaseException)
    assert not issubclass(cls, Exception)


def test_what_users_raise_is_not_caught_with_what_stepwell_raises() -> None:
    assert not issubclass(errors.Permanent, errors.StepwellError)
    assert not issubclass(errors.RetryAfter, errors.StepwellError)


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, BaseException) and not name.startswith("_"):
            assert f"── {name} " in errors.__doc__ or f" {name} " in errors.__doc__, name


def test_a_failed_run_says_which_and_why() -> None:
    error = errors.RunFailed(RUN, {"type": "crm.Rejected", "message": "no such lead"})
    assert str(error) == f"run {RUN} failed: crm.Rejected: no such lead"
    assert error.run_id == RUN
    assert error.error == {"type": "crm.Rejected", "message": "no such lead"}


def test_a_cancelled_run_needs_no_cause() -> None:
    error = errors.RunCancelled(RUN)
    assert str(error) == f"run {RUN} was cancelled"
    assert error.error is None


def test_a_blocked_run_says_how_to_resume_it() -> None:
    error = errors.RunBlocked(RUN, {"type": "HistoryMismatch", "message": "expected step a, got step b"})
    assert str(error).startswith(f"run {RUN} is blocked: HistoryMismatch: expected step a, got step b")
    assert f"stepwell runs retry {RUN}" in str(error)


def test_a_step_failed_carries_the_type_the_message_and_the_data() -> None:
    error = errors.StepFailed("crm.Rejected", "no such lead", {"lead": 17})
    assert (error.type, error.message, error.data) == ("crm.Rejected", "no such lead", {"lead": 17})
    assert str(error) == "crm.Rejected: no such lead"
    assert str(errors.StepFailed("crm.Rejected", "")) == "crm.Rejected"


def test_retry_after_takes_seconds_and_timedeltas() -> None:
    assert errors.RetryAfter(2).seconds == 2.0
    assert errors.RetryAfter(timedelta(minutes=1)).seconds == 60.0
    assert str(errors.RetryAfter(2, "too many requests")) == "too many requests"


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), timedelta(seconds=-1)])
def test_retry_after_refuses_what_is_no_wait(seconds: float | timedelta) -> None:
    with pytest.raises(ValueError, match="not negative"):
        errors.RetryAfter(seconds)


def test_a_payload_error_names_its_field() -> None:
    assert errors.PayloadError("input, field lead.id: is missing", field="lead.id").field == "lead.id"
    assert errors.PayloadError("input: is no object").field == ""
