"""Recorded faults: what is kept of an exception, and what a body sees of it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.codec import decode_fault, encode, encode_fault, has_encodable_form
from outbox.errors import ConfigError, StepFailed


@dataclass
class Declined(Exception):
    code: int
    payment: UUID | None = None


@dataclass
class DeclinedForGood(Declined):
    reason: str = ""


class Rejected(Exception):
    def __init__(self, lead: int) -> None:
        super().__init__(f"lead {lead} was rejected")
        self.lead = lead

    def to_payload(self) -> dict[str, int]:
        return {"lead": self.lead}

    @classmethod
    def from_payload(cls, data: Any) -> Rejected:
        return cls(data["lead"])


class Unwilling(Exception):
    def to_payload(self) -> Any:
        raise RuntimeError("no")

    @classmethod
    def from_payload(cls, data: Any) -> Any:
        return "not an exception"

    def __str__(self) -> str:
        raise RuntimeError("no")


@dataclass
class Holding(Exception):
    thing: object


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_fault_has_the_type_the_message_and_the_end_of_the_traceback() -> None:
    fault = encode_fault(raised(ValueError("no such lead")))
    assert (fault["type"], fault["message"]) == ("ValueError", "no such lead")
    assert fault["trace"].endswith("ValueError: no such lead\n")
    assert "in raised" in fault["trace"]
    assert "data" not in fault


def test_a_body_sees_a_step_failed() -> None:
    error = decode_fault(encode_fault(raised(KeyError("x"))))
    assert isinstance(error, StepFailed)
    assert (error.type, error.message, error.data) == ("KeyError", "'x'", None)


def test_a_dataclass_named_in_raises_is_rebuilt() -> None:
    fault = encode_fault(raised(Declined(5, UUID(int=7))), (Declined,))
    assert fault["type"] == "tests.unit.test_faults.Declined"
    assert fault["data"] == {"code": 5, "payment": "00000000-0000-0000-0000-000000000007"}
    error = decode_fault(json.loads(json.dumps(fault)), (KeyError, Declined))
    assert isinstance(error, Declined)
    assert error == Declined(5, UUID(int=7))
    assert isinstance(str(error), str)


def test_a_class_with_a_payload_of_its_own_is_rebuilt() -> None:
    error = decode_fault(encode_fault(raised(Rejected(17)), (Rejected,)), (Rejected,))
    assert isinstance(error, Rejected)
    assert (error.lead, str(error)) == (17, "lead 17 was rejected")


def test_what_is_not_in_raises_stays_a_step_failed_with_its_data() -> None:
    error = decode_fault(encode_fault(raised(Declined(5))))
    assert isinstance(error, StepFailed)
    assert error.data == {"code": 5, "payment": None}


def test_a_subclass_is_not_rebuilt_because_it_may_not_be_loaded_at_a_replay() -> None:
    error = decode_fault(encode_fault(raised(DeclinedForGood(5)), (Declined,)), (Declined,))
    assert isinstance(error, StepFailed)
    assert error.type.endswith("DeclinedForGood")


def test_args_are_never_guessed_from() -> None:
    error = decode_fault(encode_fault(raised(ValueError("x")), (ValueError,)), (ValueError,))
    assert isinstance(error, StepFailed)


def test_a_step_failed_that_passes_a_body_keeps_the_error_of_the_step() -> None:
    first = encode_fault(raised(Declined(5)))
    again = encode_fault(raised(decode_fault(first)))
    assert {**again, "trace": ""} == {**first, "trace": ""}


def test_data_that_changed_its_shape_gives_a_step_failed(caplog: pytest.LogCaptureFixture) -> None:
    fault = {"type": "tests.unit.test_faults.Declined", "message": "m", "data": {"code": "five"}}
    error = decode_fault(fault, (Declined,))
    assert isinstance(error, StepFailed)
    assert error.data == {"code": "five"}
    assert caplog.messages == ["fault not rebuilt"]


def test_an_error_that_cannot_say_anything_is_recorded_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    fault = encode_fault(Unwilling(), (Unwilling,))
    assert (fault["type"], fault["message"]) == ("tests.unit.test_faults.Unwilling", "")
    assert "data" not in fault
    assert caplog.messages == ["data of an error not recorded"]
    assert isinstance(decode_fault(fault, (Unwilling,)), StepFailed)


def test_data_that_cannot_be_carried_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert "data" not in encode_fault(Declined(code=object()))  # type: ignore[arg-type]
    assert "data" not in encode_fault(Rejected("x" * 100_000))  # type: ignore[arg-type]
    assert caplog.messages == []


@given(st.text(), st.text())
def test_any_fault_can_be_stored(message: str, cause: str) -> None:
    try:
        raise ValueError(message) from KeyError(cause)
    except ValueError as error:
        fault = encode_fault(error)
    text = encode(fault, where="fault")
    assert "\\u0000" not in text.replace("\\\\", "")


def test_long_messages_and_traces_are_cut() -> None:
    fault = encode_fault(raised(ValueError("x" * 100_000)))
    assert len(fault["message"]) < 5_000
    assert len(fault["trace"]) < 5_000


def test_a_class_says_before_it_is_used_whether_it_can_be_rebuilt() -> None:
    assert has_encodable_form(Declined)
    assert has_encodable_form(Rejected)
    assert not has_encodable_form(ValueError)
    with pytest.raises(ConfigError, match="field 'thing' of the exception `Holding`"):
        has_encodable_form(Holding)


FORGED = "X\n2026-11-28 00:00:00,000 CRITICAL 1 root: FORGED\x1b[2J\u202e"


def test_the_name_of_a_class_forges_no_line_of_a_log_and_drives_no_terminal() -> None:
    """A step may make a class of what came in. The name is what logs have of an error."""
    for error in (type(FORGED, (Exception,), {})("x"), StepFailed(FORGED, "x")):
        name = encode_fault(error)["type"]
        assert name.isprintable()
        assert name.endswith(r"X\n2026-11-28 00:00:00,000 CRITICAL 1 root: FORGED\x1b[2J\u202e")


def test_a_class_whose_name_is_spelled_out_is_rebuilt_as_any_other() -> None:
    cls = type(FORGED, (Rejected,), {})
    rebuilt = decode_fault(encode_fault(cls(3), (cls,)), (cls,))
    assert type(rebuilt) is cls


def test_names_of_all_scripts_stay_as_they_are() -> None:
    cls = type("Überweisung拒否", (Exception,), {})
    assert encode_fault(cls())["type"].endswith(".Überweisung拒否")
