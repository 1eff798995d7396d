"""Payload ⇄ JSON text: `encode`, `decode`, `fingerprint`.

msgspec does the work, at C speed. It accepts a few values that would not come back as they went in: NaN becomes
null, a key 1 becomes "1", a set has another order in every process. So a quick look goes first (`_is_clean`) that
knows the common shapes; whatever it does not know, and whatever it or msgspec refuses, is walked a second time
with paths (`_nodes`), to say *where* the fault is. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

import msgspec

from outbox.errors import ConfigError, PayloadError

DEFAULT_MAX_BYTES = 1_048_576

# What carries no fault that the encoded text would not show.
_PLAIN = frozenset({str, int, bool, type(None), bytes, date, timedelta, UUID})


def encode(
    value: Any, *, where: str, max_bytes: int = DEFAULT_MAX_BYTES, parts: tuple[Any, ...] | None = None
) -> str:
    """Return `value` as JSON text.

    Raises PayloadError, which begins with `where` ("input of workflow 'welcome_lead'") and names the field. `parts`
    are what of the value is not known to be clean, if that is less than all of it.
    """
    looked_at = value if parts is None else parts
    try:
        if type(looked_at) in _PLAIN or _is_clean(looked_at):
            raw = _ENCODER.encode(value)
        else:
            raw = _encode_with_care(value, where)
    except PayloadError:
        raise
    except Exception as error:  # the caller's own classes run in here: serializers, properties
        raise _fault_in(value, where, error) or _unexplained(where, error) from error
    if len(raw) > max_bytes:
        raise _too_large(value, where, len(raw), max_bytes)
    text = raw.decode()
    if _NUL in text and (found := _fault_in(value, where)):
        raise found
    if text.startswith(_RESERVED):
        raise fault(where, "", 'begins with a field named "stepwell:…", and such names are Stepwell\'s own')
    return text


def decode(text: str | bytes, type_: Any = Any, *, where: str) -> Any:
    """Return the value of JSON `text`, as `type_` says.

    The same text always gives an equal value. Raises PayloadError naming the field, ConfigError for a `type_`
    that nothing can be decoded to.
    """
    return read(decoder_of(type_), text, where)


def read(decoder: msgspec.json.Decoder[Any], text: str | bytes, where: str) -> Any:
    """Return the value of JSON `text` by `decoder`; raises PayloadError naming the field."""
    try:
        value = decoder.decode(text)
    except Exception as error:  # the caller's own classes run in here: __post_init__, validators
        raise fault(where, *finding_of(error)) from error
    if _NUL in (text if isinstance(text, str) else text.decode()) and (
        found := _fault_in(_ANY.decode(text), where)
    ):
        raise found
    return value


def fingerprint(text_or_value: Any) -> int:
    """Return a signed 64-bit hash that ignores the order of keys and white space.

    A str or bytes is JSON text; anything else is a value.
    """
    value = _ANY.decode(text_or_value) if isinstance(text_or_value, str | bytes) else text_or_value
    digest = hashlib.blake2b(_CANONICAL.encode(value), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def decoder_of(type_: Any) -> msgspec.json.Decoder[Any]:
    """Return the decoder for `type_`, made once. Raises ConfigError if nothing can be decoded to it."""
    if type_ is Any:
        return _ANY
    try:
        return _cached_decoder(type_)
    except TypeError:  # not hashable (Annotated with a dict), or not supported: the second attempt says which
        return _new_decoder(type_)


def require_decodable(type_: Any, what: str) -> None:
    """Raise ConfigError, beginning with `what`, if values of `type_` cannot be told from JSON."""
    try:
        problem = _problem_with(msgspec.inspect.type_info(type_), set())
        if problem is None:
            msgspec.json.Decoder(type_, dec_hook=from_json)  # unions that cannot be told apart fail here
    except TypeError as error:
        problem = str(error)
    if problem is not None:
        raise ConfigError(f"{what}: {problem}")


def is_pydantic_model(cls: Any) -> bool:
    """Tell whether `cls` is a pydantic model, without importing pydantic: whoever has a model has imported it."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(cls, type) and issubclass(cls, pydantic.BaseModel)


def fault(where: str, field: str, reason: str, kind: str = "field") -> PayloadError:
    """Return the PayloadError for `field` of `where`: "input of workflow 'w', field lead.id: expected `int`…"."""
    return PayloadError(f"{where}, {kind} {field}: {reason}" if field else f"{where}: {reason}", field=field)


def finding_of(error: Exception) -> tuple[str, str]:
    """Return (field, reason) of what a decoder raised."""
    if isinstance(error, RecursionError):
        return "", "is nested too deeply"
    if isinstance(error, msgspec.DecodeError | UnicodeError) and not isinstance(
        error, msgspec.ValidationError
    ):
        return "", f"is not valid JSON: {str(error).removeprefix('JSON is malformed: ')}"
    if not isinstance(error, msgspec.ValidationError):
        return "", _told(error)
    reason, *paths = str(error).split(" - at `")
    # A pydantic model reports its own path first, msgspec adds the one to the model after it.
    field = "".join(_as_field(path) for path in reversed(paths))
    if named := re.match(r"Object (missing required|contains unknown) field `(.*)`", reason, re.DOTALL):
        field = f"{field}.{named[2]}"
        reason = "is missing" if named[1] == "missing required" else "no such field is known here"
    return field.lstrip("."), reason[:1].lower() + reason[1:]


def _as_field(path: str) -> str:
    """Return '.lead.emails[2]' for msgspec's '$.lead.emails[2]`' or 'key` in `$.lead`'."""
    return path.rsplit("$", 1)[-1].rstrip("`")


# --- looking through a value before it is encoded ---------------------------------------------------------------


def _is_clean(value: Any) -> bool:  # noqa: C901 - flat, and on the hot path
    """Tell whether `value` surely comes back from JSON as it went in. False means: look closer."""
    cls: Any = type(value)
    if cls in _PLAIN:
        return True
    if cls is float:
        return math.isfinite(value)
    if cls is dict:
        for key, item in value.items():
            if type(key) is not str:
                return False
            if type(item) not in _PLAIN and not _is_clean(item):
                return False
        return True
    if cls is list or cls is tuple:
        parts = value
    elif cls is Decimal:
        return bool(value.is_finite())
    elif cls is datetime:
        return value.tzinfo is None or value.tzinfo is UTC or _has_whole_minutes(value)
    else:
        fields_of = _reader_of_fields(cls)
        if fields_of is None:
            return False
        parts = fields_of(value)
    for item in parts:  # noqa: SIM110 - a generator costs more than all of the rest
        if type(item) not in _PLAIN and not _is_clean(item):
            return False
    return True


@lru_cache(maxsize=4096)
def _reader_of_fields(cls: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    """Return what gives the fields of a value of `cls` as a tuple; None if `cls` is not known to have fields."""
    names = _field_names(cls)
    if names is None:
        return None
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


@lru_cache(maxsize=4096)
def _field_names(cls: Any) -> tuple[str, ...] | None:
    """Return the names of the fields that `cls` is encoded with, () for an enum, None for anything else."""
    if issubclass(cls, msgspec.Struct):
        return tuple(cls.__struct_fields__)
    if dataclasses.is_dataclass(cls):
        return tuple(each.name for each in dataclasses.fields(cls) if each.init)
    if hasattr(cls, "__attrs_attrs__"):
        return tuple(each.name for each in cls.__attrs_attrs__)
    return () if issubclass(cls, enum.Enum) else None


def _has_whole_minutes(value: datetime | time) -> bool:
    offset = value.utcoffset()
    return offset is None or not offset % timedelta(minutes=1)


def _encode_with_care(value: Any, where: str) -> bytes:
    """Encode what the quick look did not know: refuse its faults, write sets in order."""
    has_sets = False
    for path, node in _nodes(value, ""):
        if reason := _reason_against(node):
            raise fault(where, path.lstrip("."), reason)
        has_sets = has_sets or isinstance(node, set | frozenset)
    # Two processes must write one set alike, or every replay would look like drift. This sorts the keys of the
    # dicts beside it as well, which harms nobody: a body sees the order that is recorded.
    return (_ORDERED if has_sets else _ENCODER).encode(value)


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every value inside `value`, itself first, with its path ('.lead.emails[2]')."""
    yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nodes(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _nodes(item, f"{path}[{index}]")
    elif isinstance(value, set | frozenset):
        for item in value:
            yield from _nodes(item, f"{path}[…]")
    elif is_pydantic_model(type(value)):
        yield from _nodes(to_json(value), path)
    else:
        cls: Any = type(value)
        for name in _field_names(cls) or ():
            yield from _nodes(getattr(value, name, None), f"{path}.{name}")


def _reason_against(node: Any) -> str | None:
    """Return why this value, taken without its children, cannot be carried, or None."""
    if isinstance(node, str):
        return _reason_against_text(node)
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str):
                return f"has a key of type `{_type_name(key)}`; the keys of a JSON object are strings"
            if reason := _reason_against_text(key):
                return f"has a key that {reason}"
    elif (isinstance(node, float) and not math.isfinite(node)) or (
        isinstance(node, Decimal) and not node.is_finite()
    ):
        return "is NaN or infinite, which JSON cannot express"
    elif isinstance(node, datetime | time) and not _has_whole_minutes(node):
        return "has an offset from UTC with seconds in it, and JSON dates have whole minutes; use astimezone(UTC)"
    elif isinstance(node, int) and node.bit_length() > _MAX_BITS:
        return "is an integer of more than 4,000 digits"
    elif isinstance(node, set | frozenset):
        try:
            sorted(node)
        except TypeError:
            return "is a set whose members have no order, so it cannot be written the same way twice; pass a list"
    elif isinstance(node, msgspec.Raw):
        return "is raw JSON that nobody has checked; pass the value"
    return None


def _reason_against_text(text: str) -> str | None:
    if "\0" in text:
        return "contains a NUL character (U+0000), which Postgres cannot store in text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains a lone surrogate (U+{ord(text[error.start]):04X}), which is half a character"
    return None


def _fault_in(value: Any, where: str, error: Exception | None = None) -> PayloadError | None:
    """Return the first fault inside `value`; with `error`, also a leaf that the encoder refuses by itself."""
    try:
        for path, node in _nodes(value, ""):
            reason = _reason_against(node) or (_refusal_of(node) if error is not None else None)
            if reason is not None:
                return fault(where, path.lstrip("."), reason)
    except RecursionError:
        return fault(where, "", "refers to itself, or is nested too deeply")
    except Exception:  # noqa: BLE001 - the caller's own classes run in here: properties, iterators
        return None
    return None


def _refusal_of(node: Any) -> str | None:
    """Return why the encoder refuses a value that holds no others, or None."""
    cls: Any = type(node)
    if isinstance(node, Mapping | list | tuple | set | frozenset) or _field_names(cls):
        return None
    try:
        _ENCODER.encode(node)
    except Exception as error:  # noqa: BLE001 - as in encode
        return str(error)
    return None


def _unexplained(where: str, error: Exception) -> PayloadError:
    return fault(where, "", _told(error))


def _told(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the caller's own __str__
        return type(error).__name__


def _too_large(value: Any, where: str, size: int, max_bytes: int) -> PayloadError:
    """Return the PayloadError that names the innermost part which makes up most of `size`."""
    field = ""
    for path, node in _nodes(value, ""):
        if path.startswith(field) and len(_ENCODER.encode(node)) * 5 > size * 4:
            field = path
    reason = f"{size:,} bytes as JSON in all, and the limit (max_payload_bytes) is {max_bytes:,}"
    return fault(
        where, field.lstrip("."), f"too large: {reason}; keep large data elsewhere, pass its address"
    )


def _type_name(value: Any) -> str:
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# --- what msgspec does not know by itself -----------------------------------------------------------------------


def to_json(value: Any) -> Any:
    if is_pydantic_model(type(value)):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(
        f"an object of type `{_type_name(value)}` cannot be written as JSON; pass plain data, a dataclass, "
        "a msgspec Struct or a pydantic model"
    )


def from_json(cls: type, plain: Any) -> Any:
    if not is_pydantic_model(cls):
        raise TypeError(f"nothing can be decoded to `{cls.__qualname__}`")
    try:
        # As JSON, not as Python: a strict model accepts the text of a date or a UUID in JSON only.
        return cls.model_validate_json(_ENCODER.encode(plain))  # type: ignore[attr-defined]  # a pydantic model
    except ValueError as error:
        raise ValueError(_first_of(error)) from error


def _first_of(error: ValueError) -> str:
    """Return the first finding of pydantic's ValidationError, with its path in msgspec's own notation."""
    errors = getattr(error, "errors", tuple)  # only pydantic's has them
    for finding in errors():
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"])
        return f"{finding['msg']} - at `${path}`"
    return str(error)


def _problem_with(info: Any, seen: set[int]) -> str | None:
    """Return why values of a type (as msgspec.inspect describes it) cannot be decoded, or None."""
    if id(info) in seen:
        return None
    seen.add(id(info))
    match info:
        case msgspec.inspect.CustomType(cls):
            if not is_pydantic_model(cls):
                return (
                    f"`{cls.__qualname__}` cannot be decoded from JSON; use plain types, a dataclass, "
                    "a msgspec Struct or a pydantic model"
                )
        case msgspec.inspect.DataclassType(cls=cls) if issubclass(cls, BaseException):
            return f"the exception `{cls.__qualname__}` cannot be a payload; pass its data"
        case msgspec.inspect.DictType(key_type=key) if not isinstance(key, _KEY_TYPES):
            return "the keys of a dict must be `str`, because the keys of a JSON object are strings"
    parts = msgspec.structs.astuple(info) if isinstance(info, msgspec.Struct) else info
    for part in parts:
        if isinstance(part, msgspec.inspect.Type | msgspec.inspect.Field | tuple):
            problem = _problem_with(part, seen)
            if problem is not None:
                return problem
    return None


def _new_decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    require_decodable(type_, f"a value annotated {type_!r}")
    return msgspec.json.Decoder(type_, dec_hook=from_json)


_cached_decoder = lru_cache(maxsize=4096, typed=True)(_new_decoder)

_KEY_TYPES = (
    msgspec.inspect.AnyType,
    msgspec.inspect.StrType,
    msgspec.inspect.EnumType,
    msgspec.inspect.LiteralType,
)
_MAX_BITS = 13_287  # 4,000 digits; Python itself converts at most 4,300 from and to text
_NUL = "\\u0000"
_RESERVED = '{"stepwell:'  # how a value begins that is sealed, or that was forgotten
_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder(enc_hook=to_json)
_ORDERED = msgspec.json.Encoder(enc_hook=to_json, order="deterministic")
_CANONICAL = msgspec.json.Encoder(enc_hook=to_json, order="sorted")
