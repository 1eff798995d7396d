"""A published JSON Schema as a type, so that the codec checks by it as it does by a function's annotations.

The reasons it gives, the paths in them and the lenient reading of CSV cells are then those of the codec, whether
an input is checked by the function itself or by what a worker has published of it. What a schema says beyond
the types that msgspec knows (conditions, unions that it cannot tell apart) is not checked here: the worker has
the last word.
"""

from __future__ import annotations

import functools
import keyword
import operator
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

_DEEPEST = 20  # a schema that contains itself is followed so far, and anything is accepted below

_FORMATS: dict[str, Any] = {
    "date-time": datetime,
    "date": date,
    "time": time,
    "duration": timedelta,
    "uuid": UUID,
    "decimal": Decimal,
}
_NUMBER_LIMITS = {
    "minimum": "ge",
    "exclusiveMinimum": "gt",
    "maximum": "le",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
}
_TEXT_LIMITS = {"minLength": "min_length", "maxLength": "max_length", "pattern": "pattern"}
_LIST_LIMITS = {"minItems": "min_length", "maxItems": "max_length"}


def struct_of(schema: Mapping[str, Any]) -> type[msgspec.Struct]:
    """Return a Struct with a field for each parameter of a workflow whose input `schema` describes."""
    reader = _Reader(schema.get("$defs", {}))
    return reader.struct(reader.resolved(schema), _DEEPEST)


class _Reader:
    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions

    def resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a reference points to, anything else as it is."""
        for _ in range(_DEEPEST):
            pointed = str(schema.get("$ref", "")).removeprefix("#/$defs/")
            if not pointed:
                break
            schema = self._definitions.get(pointed, {})
        return schema

    def struct(self, schema: Mapping[str, Any], depth: int) -> type[msgspec.Struct]:
        required = set(schema.get("required", ()))
        fields: list[tuple[str, Any, Any]] = []
        for at, (name, of_field) in enumerate(schema.get("properties", {}).items()):
            # Left out means left out: the worker fills in the default of its own release.
            default = msgspec.NODEFAULT if name in required else msgspec.UNSET
            plain = name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
            field = msgspec.field(default=default, name=name)
            fields.append((name if plain else f"field_{at}", self.type_of(of_field, depth - 1), field))
        return msgspec.defstruct(
            "Input", fields, kw_only=True, forbid_unknown_fields=schema.get("additionalProperties") is False
        )

    def type_of(self, schema: Any, depth: int) -> Any:
        """Return the type of what `schema` describes; Any if msgspec has none for it."""
        if depth <= 0 or not isinstance(schema, Mapping):
            return Any
        try:
            type_ = self._type_of(self.resolved(schema), depth)
            msgspec.json.Decoder(type_)
        except (TypeError, ValueError, re.error):
            return Any
        return type_

    def _type_of(self, schema: Mapping[str, Any], depth: int) -> Any:
        if "const" in schema:
            return Literal[schema["const"]]
        if "enum" in schema:
            return Literal[tuple(schema["enum"])]
        choices = schema.get("anyOf") or schema.get("oneOf")
        if choices:
            return _union(self.type_of(choice, depth) for choice in choices)
        named = schema.get("type")
        if isinstance(named, list):
            return _union(self.type_of({**schema, "type": one}, depth) for one in named)
        match named:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return _text(schema)
            case "integer":
                return _limited(int, schema, _NUMBER_LIMITS)
            case "number":
                return _limited(float, schema, _NUMBER_LIMITS)
            case "boolean":
                return bool
            case "null":
                return None
        return Any

    def _object(self, schema: Mapping[str, Any], depth: int) -> Any:
        if "properties" in schema:
            return self.struct(schema, depth)
        values = schema.get("additionalProperties", True)
        return dict[str, self.type_of(values, depth - 1) if isinstance(values, Mapping) else Any]  # type: ignore[misc]  # made at run time

    def _array(self, schema: Mapping[str, Any], depth: int) -> Any:
        if "prefixItems" in schema:
            return tuple[tuple(self.type_of(item, depth - 1) for item in schema["prefixItems"])]  # type: ignore[misc]  # made at run time
        items = self.type_of(schema.get("items"), depth - 1)
        return _limited(list[items], schema, _LIST_LIMITS)  # type: ignore[valid-type]  # made at run time


def _union(types: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, types)


def _text(schema: Mapping[str, Any]) -> Any:
    if schema.get("contentEncoding") == "base64":
        return bytes
    known = _FORMATS.get(schema.get("format", ""))
    return known if known is not None else _limited(str, schema, _TEXT_LIMITS)


def _limited(type_: Any, schema: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    limits = {ours: schema[theirs] for theirs, ours in names.items() if theirs in schema}
    return Annotated[type_, msgspec.Meta(**limits)] if limits else type_
