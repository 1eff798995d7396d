"""Exceptions ⇄ recorded faults: `encode_fault`, `decode_fault`.

A fault is a JSON object: `type` (the qualified name of the class), `message`, `data` (the encodable form of the
exception, if it has one) and `trace` (the end of the traceback). An exception has an encodable form if it is a
dataclass, or has `to_payload()` and the class method `from_payload(data)`. It is never guessed from `args`.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
import typing
from collections.abc import Mapping
from typing import Any

from outbox.errors import StepFailed
from outbox.payloads import decode, encode, require_decodable

_MAX_NAME = 1_000
_MAX_MESSAGE = 4_000
_MAX_DATA_BYTES = 65_536
_MAX_TRACE = 4_000
_FRAMES = 12

logger = logging.getLogger(__name__)


def encode_fault(error: BaseException, raises: tuple[type[BaseException], ...] = ()) -> dict[str, Any]:
    """Return what is recorded of `error`: ``type``, ``message`` and, where there is one, ``data`` and ``trace``.

    A StepFailed that a body lets through keeps the type, message and data of the step's own error. It never
    raises: what of the error cannot be written is left out, with a warning if a class in `raises` then cannot be
    rebuilt from it.
    """
    if isinstance(error, StepFailed):
        fault = {"type": _name(str(error.type)), "message": _text(error.message, _MAX_MESSAGE)}
        data = error.data
    else:
        fault = {"type": qualified_name(type(error)), "message": _message_of(error)}
        data = _data_of(error, warn=isinstance(error, raises))
    if data is not None:
        fault["data"] = data
    return {**fault, "trace": _trace_of(error)}


def decode_fault(fault: Mapping[str, Any], raises: tuple[type[BaseException], ...] = ()) -> Exception:
    """Return the exception that a body sees for a recorded fault.

    It is rebuilt if its very class is in `raises` (a subclass is not: whether that is loaded may differ between
    two processes) and has an encodable form; otherwise it is a StepFailed.
    """
    type_, message, data = str(fault.get("type", "")), str(fault.get("message", "")), fault.get("data")
    for cls in raises:
        if qualified_name(cls) == type_ and issubclass(cls, Exception) and has_encodable_form(cls):
            try:
                return _rebuilt(cls, data)
            except Exception as failure:  # noqa: BLE001 - the user's from_payload; the fault must not be lost
                logger.warning("fault not rebuilt", extra={"type": type_, "reason": str(failure)})
    return StepFailed(type_, message, data)


def has_encodable_form(cls: type[BaseException]) -> bool:
    """Tell whether an exception of `cls` can be rebuilt from what is recorded of it.

    Raises ConfigError for a dataclass with a field that cannot be decoded from JSON.
    """
    if hasattr(cls, "to_payload") and hasattr(cls, "from_payload"):
        return True
    if not hasattr(cls, "__dataclass_fields__"):
        return False
    for name, type_ in typing.get_type_hints(cls, include_extras=True).items():
        require_decodable(type_, f"field {name!r} of the exception `{cls.__qualname__}`")
    return True


def qualified_name(cls: type) -> str:
    """Return `module.Class`, without the module for what is built in."""
    return _name(cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}")


def _name(name: str) -> str:
    """Return the name of a class as it is recorded and logged: a line break or a control character in it is spelled out.

    A class can have any name that its step gives it, and that can be made of what came in.
    """
    return _text(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name), _MAX_NAME
    )


def _data_of(error: BaseException, *, warn: bool) -> Any:
    """Return the encodable form of `error` as plain JSON values, or None."""
    where = f"data of {qualified_name(type(error))}"
    try:
        to_payload = getattr(error, "to_payload", None)
        if to_payload is not None:
            data = to_payload()
        elif hasattr(error, "__dataclass_fields__"):
            fields = dataclasses.fields(typing.cast("Any", error))
            data = {each.name: getattr(error, each.name) for each in fields if each.init}
        else:
            return None
        return decode(encode(data, where=where, max_bytes=_MAX_DATA_BYTES), where=where)
    except BaseException as failure:  # noqa: BLE001 - the user's to_payload: not even SystemExit may end the worker
        if warn:
            reason = _message_of(failure)
            logger.warning("data of an error not recorded", extra={"type": where, "reason": reason})
        return None


def _rebuilt(cls: type[Exception], data: Any) -> Exception:
    from_payload = getattr(cls, "from_payload", None)
    if from_payload is not None:
        rebuilt = from_payload(data)
        if not isinstance(rebuilt, cls):
            raise TypeError(f"from_payload gave {type(rebuilt).__qualname__}")
        return rebuilt
    # By hand and not through msgspec, which makes dataclasses without __new__: an exception made so has no args.
    hints = typing.get_type_hints(cls, include_extras=True)
    where = f"data of {qualified_name(cls)}"
    given = dict(data or {})
    return cls(**{name: decode(encode(given[name], where=where), hints[name], where=where) for name in given})


def _message_of(error: BaseException) -> str:
    try:
        # A dataclass that was made by keyword has no args, and then str() is empty.
        return _text(
            str(error) or (repr(error) if hasattr(error, "__dataclass_fields__") else ""), _MAX_MESSAGE
        )
    except BaseException:  # noqa: BLE001 - the user's __str__; an error that cannot say what it is still has a type
        return ""


def _trace_of(error: BaseException) -> str:
    try:
        return _text("".join(traceback.format_exception(error, limit=-_FRAMES)), _MAX_TRACE, keep_end=True)
    except BaseException:  # noqa: BLE001 - the user's __str__, notes, causes
        return ""


def _text(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Return `text` as Postgres can store it: no NUL, no lone surrogates, at most `limit` characters."""
    clean = text.replace("\0", "\ufffd").encode(errors="replace").decode()
    if len(clean) <= limit:
        return clean
    return f"…{clean[-limit:]}" if keep_end else f"{clean[:limit]}…"
