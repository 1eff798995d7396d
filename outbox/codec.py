"""Payload ⇄ JSON text, typed, size-limited, exact: the one door to it.

What is recorded is the text that was encoded, character for character, and the same text always decodes to an equal
value, so that a replay sees what the live run saw. Values are told by annotation: dataclasses, msgspec Structs,
pydantic models, datetime, date, time, timedelta, UUID, Decimal, Enum, bytes, and containers, optionals and unions of
them. What has no annotation is plain JSON. Anything that would not come back as it went in (NaN, keys that are not
text, NUL characters, half characters, objects without a JSON form) is a PayloadError at the caller that names the
field. Nothing is ever unpickled.

`outbox.payloads` encodes and decodes single values, `outbox.signatures` whole calls, `outbox.rows` CSV rows,
`outbox.faults` exceptions.
"""

from __future__ import annotations

from outbox.faults import decode_fault, encode_fault, has_encodable_form
from outbox.payloads import DEFAULT_MAX_BYTES, decode, encode, fingerprint
from outbox.signatures import Signature

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Signature",
    "decode",
    "decode_fault",
    "encode",
    "encode_fault",
    "fingerprint",
    "has_encodable_form",
]
