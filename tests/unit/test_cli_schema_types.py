"""A published JSON Schema checks an input as the function's own annotations would."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pydantic
import pytest

from outbox.codec import Signature
from outbox.errors import PayloadError
from worker.cli.contracts import Contract, Published


class Source(enum.Enum):
    WEB = "web"
    FAIR = "fair"


@dataclass
class Node:
    value: int
    children: list[Node] = field(default_factory=list)


@dataclass
class Lead:
    id: int
    name: str
    email: str | None = None
    signed_up_at: datetime | None = None
    source: Source = Source.WEB
    tags: list[str] = field(default_factory=list)
    worth: Decimal = Decimal(1)
    node: Node | None = None


class Model(pydantic.BaseModel):
    id: int
    class_: str = pydantic.Field(alias="class")
    numbers: list[int] | None = None


def of_lead(lead: Lead) -> None: ...


def of_many(
    lead: Lead,
    count: Annotated[int, msgspec.Meta(ge=3)] = 3,
    *,
    raw: bytes = b"",
    either: int | str = 3,
    scores: dict[str, int] | None = None,
    pair: tuple[int, str] | None = None,
    wait: timedelta | None = None,
    id: UUID | None = None,
    choice: Literal["x", "y"] = "x",
    anything: Any = None,
) -> None: ...


def of_model(model: Model) -> None: ...


def published(function: Any) -> Published:
    return Published(json.loads(json.dumps(Signature.of(function).json_schema())))


LEAD = {"id": 1, "name": "Ada"}

INPUTS: list[tuple[Any, dict[str, Any]]] = [
    (of_many, {"lead": LEAD}),
    (of_many, {"lead": {**LEAD, "unknown": 1}}),
    (of_many, {"lead": LEAD, "unknown": 1}),
    (of_many, {}),
    (of_many, {"lead": None}),
    (of_many, {"lead": {"id": "1", "name": "Ada"}}),
    (of_many, {"lead": {"id": 1}}),
    (of_many, {"lead": {**LEAD, "email": None, "tags": ["a", "b"]}}),
    (of_many, {"lead": {**LEAD, "tags": ["a", 1]}}),
    (of_many, {"lead": {**LEAD, "source": "fair"}}),
    (of_many, {"lead": {**LEAD, "source": "elsewhere"}}),
    (of_many, {"lead": {**LEAD, "worth": "1.50"}}),
    (of_many, {"lead": {**LEAD, "worth": "much"}}),
    (of_many, {"lead": {**LEAD, "node": {"value": 1, "children": [{"value": 2}]}}}),
    (of_many, {"lead": {**LEAD, "node": {"value": 1, "children": [{"value": "2"}]}}}),
    (of_many, {"lead": LEAD, "count": 2}),
    (of_many, {"lead": LEAD, "raw": "aGk="}),
    (of_many, {"lead": LEAD, "raw": "?"}),
    (of_many, {"lead": LEAD, "either": "text"}),
    (of_many, {"lead": LEAD, "either": 1.5}),
    (of_many, {"lead": LEAD, "scores": {"a": 1}}),
    (of_many, {"lead": LEAD, "scores": {"a": "1"}}),
    (of_many, {"lead": LEAD, "pair": [1, "a"]}),
    (of_many, {"lead": LEAD, "pair": [1]}),
    (of_many, {"lead": LEAD, "wait": "PT5S"}),
    (of_many, {"lead": LEAD, "wait": "soon"}),
    (of_many, {"lead": LEAD, "id": "7e9f1c1e-8c5f-4b8e-9d3c-0c2f3f1c9a11"}),
    (of_many, {"lead": LEAD, "id": "7"}),
    (of_many, {"lead": LEAD, "choice": "y"}),
    (of_many, {"lead": LEAD, "choice": "z"}),
    (of_many, {"lead": LEAD, "anything": [{"a": None}]}),
    (of_model, {"model": {"id": 1, "class": "x", "numbers": [1]}}),
]


def verdict(rules: Any, given: dict[str, Any]) -> str | None:
    try:
        rules.check_input(given, where="input")
    except PayloadError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("function", "given"), INPUTS)
def test_the_schema_says_what_the_function_says(function: Any, given: dict[str, Any]) -> None:
    assert verdict(published(function), given) == verdict(Signature.of(function), given)


def test_a_wrong_field_of_a_model_is_named() -> None:
    assert verdict(published(of_model), {"model": {"id": "x", "class": "y"}}) == (
        "input, field model.id: expected `int`, got `str`"
    )


ROWS: list[dict[str, str | None]] = [
    {"id": "17", "name": "Ada", "email": "", "tags": '["a"]', "source": "fair", "worth": "2.5"},
    {"id": " 17 ", "name": "", "signed_up_at": "2026-11-22T12:00:00Z", "other": "x"},
    {"id": "17", "name": "Ada", "node": '{"value": 1}'},
    {"id": "", "name": "Ada"},
    {"id": "many", "name": "Ada"},
    {"name": "Ada"},
    {"id": "1", "name": "Ada", "tags": "[1]"},
    {"id": "1", "name": "Ada", "source": "elsewhere"},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_csv_row_becomes_the_same_lead_by_schema_and_by_function(row: dict[str, str | None]) -> None:
    signature = Signature.of(of_lead)
    try:
        wanted: Any = signature.decode_row(row, where="row")["lead"]
    except PayloadError as error:
        wanted = str(error)
    try:
        given = published(of_lead).decode_row(row, where="row")
        (found,), _ = signature.decode_arguments(json.dumps(given), where="input")
    except PayloadError as error:
        found = str(error)
    assert found == wanted


def test_what_a_row_leaves_out_is_left_to_the_worker() -> None:
    assert published(of_lead).decode_row({"id": "1", "name": "Ada", "email": ""}, where="row") == {
        "lead": LEAD
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"not": {}}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/Missing"}}},
        {
            "type": "object",
            "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "string", "format": "uuid"}]}},
        },
        {"type": "object", "properties": {"a": {"type": ["string", "null", "object"]}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {"enum": []}}},
        {},
    ],
)
def test_a_schema_that_is_not_understood_lets_everything_pass(schema: dict[str, Any]) -> None:
    Published(schema).check_input({"a": "anything"}, where="input")


def test_a_schema_that_contains_itself_is_followed_to_some_depth() -> None:
    rules = published(of_lead)
    node: dict[str, Any] = {"value": 1}
    for _ in range(100):
        node = {"value": 1, "children": [node]}
    rules.check_input({"lead": {**LEAD, "node": node}}, where="input")


def test_a_json_row_is_the_input_or_its_one_parameter() -> None:
    contract = Contract("w", rules=published(of_lead))
    assert contract.of_object({"lead": LEAD}, "line 1") == {"lead": LEAD}
    assert contract.of_object(LEAD, "line 1") == {"lead": LEAD}
    with pytest.raises(PayloadError, match=r"^line 1, field id: expected `int`, got `str`$"):
        contract.of_object({"id": "1", "name": "Ada"}, "line 1")
