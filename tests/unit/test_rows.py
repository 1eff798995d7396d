"""CSV rows: read leniently by the types that the workflow wants, refused by column."""

from __future__ import annotations

import csv
import enum
import io
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

from outbox.codec import Signature
from outbox.errors import PayloadError


class Source(enum.Enum):
    WEB = "web"
    FAIR = "fair"


@dataclass
class Lead:
    id: int
    name: str
    phone: str | None
    score: float = 0.5
    subscribed: bool = False
    source: Source = Source.WEB
    since: date | None = None
    budget: Decimal | None = None
    tags: list[str] = field(default_factory=list)


class Closed(msgspec.Struct, forbid_unknown_fields=True):
    id: int


class Pair(TypedDict):
    id: int
    name: str


class Model(pydantic.BaseModel):
    id: int
    name: str
    score: float = 0.5
    phone: str | None = None


def welcome(lead: Lead) -> None: ...
def welcome_optional(lead: Lead | None) -> None: ...
def welcome_closed(lead: Closed) -> None: ...
def welcome_pair(lead: Pair) -> None: ...
def welcome_model(lead: Model) -> None: ...
def welcome_untyped(lead): ...  # type: ignore[no-untyped-def]
def welcome_dict(lead: dict[str, str]) -> None: ...
def greet(id: int, name: str = "friend", since: date | None = None) -> None: ...
def count(n: int) -> None: ...


def row_of(text: str) -> dict[str, str | None]:
    return next(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("function", [welcome, welcome_optional])
def test_one_object_parameter_takes_the_row(function: Any) -> None:
    row = row_of(
        "id,name,phone,score,subscribed,source,since,budget\n 17 , Ada ,123,1.5,true,fair,2026-01-02,9.50\n"
    )
    assert Signature.of(function).decode_row(row) == {
        "lead": Lead(17, " Ada ", "123", 1.5, True, Source.FAIR, date(2026, 1, 2), Decimal("9.50"))
    }


def test_an_empty_cell_is_none_where_that_is_allowed_and_the_default_where_there_is_one() -> None:
    row = row_of("id,name,phone,score,subscribed,source,since,budget,tags\n1,Ada,,, ,,,,\n")
    assert Signature.of(welcome).decode_row(row) == {"lead": Lead(1, "Ada", None)}


def test_an_empty_cell_stays_empty_text_where_text_is_required() -> None:
    assert Signature.of(welcome).decode_row(row_of("id,name,phone\n1,,2\n")) == {"lead": Lead(1, "", "2")}


def test_a_list_is_read_as_json() -> None:
    row = row_of('id,name,phone,tags\n1,Ada,,"[""a"", ""b""]"\n')
    assert Signature.of(welcome).decode_row(row)["lead"].tags == ["a", "b"]


def test_columns_that_the_object_does_not_have_are_ignored_unless_it_forbids_them() -> None:
    assert Signature.of(welcome).decode_row(row_of("id,name,phone,color\n1,Ada,,red\n"))
    with pytest.raises(PayloadError, match="column color: no such field is known here"):
        Signature.of(welcome_closed).decode_row(row_of("id,color\n1,red\n"))


def test_typed_dicts_and_models_and_plain_dicts_take_the_row_too() -> None:
    row = row_of("id,name,score,phone\n3,Ada,,\n")
    assert Signature.of(welcome_pair).decode_row(row_of("id,name\n3,Ada\n")) == {
        "lead": {"id": 3, "name": "Ada"}
    }
    assert Signature.of(welcome_model).decode_row(row) == {"lead": Model(id=3, name="Ada")}
    plain = {"lead": {"id": "3", "name": "Ada", "score": "", "phone": ""}}
    assert Signature.of(welcome_untyped).decode_row(row) == plain
    assert Signature.of(welcome_dict).decode_row(row) == plain


def test_otherwise_columns_are_parameters() -> None:
    assert Signature.of(greet).decode_row(row_of("id,name,since\n4,,\n")) == {
        "id": 4,
        "name": "friend",
        "since": None,
    }
    assert Signature.of(count).decode_row(row_of("n\n4\n")) == {"n": 4}
    with pytest.raises(PayloadError, match="row 7, column color: no such field is known here"):
        Signature.of(greet).decode_row(row_of("id,color\n4,red\n"), where="row 7")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,name,phone\nx,Ada,\n", "row 7, column id: not an `int`"),
        ("id,name,phone\n,Ada,\n", "row 7, column id: is empty"),
        ("name,phone\nAda,\n", "row 7, column id: is missing"),
        ("id,name,phone\n1\n", "row 7, column name: is empty"),
        ("id,name,phone\n1,Ada,,more\n", "row 7: has more cells than there are columns"),
        ("id,name,phone,source\n1,Ada,,tv\n", "row 7, column source: invalid enum value 'tv'"),
        ("id,name,phone,score\n1,Ada,,high\n", "row 7, column score: not a `float`"),
        ("id,name,phone,since\n1,Ada,,2026-02-30\n", "row 7, column since: invalid RFC3339 encoded date"),
        ("id,name,phone,tags\n1,Ada,,[1\n", "row 7, column tags: is not valid JSON"),
        ("id,name,phone,tags\n1,Ada,,[1]\n", "row 7, column tags[0]: expected `str`, got `int`"),
    ],
)
def test_a_bad_row_names_its_column(text: str, says: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Signature.of(welcome).decode_row(row_of(text), where="row 7")
    assert str(caught.value).startswith(says)


def test_a_bad_row_for_a_model_names_its_column() -> None:
    with pytest.raises(PayloadError, match="column id: input should be a valid integer"):
        Signature.of(welcome_model).decode_row(row_of("id,name\nx,Ada\n"))


def test_what_a_row_gives_can_be_encoded_and_called() -> None:
    signature = Signature.of(welcome)
    given = signature.decode_row(row_of("id,name,phone\n1,Ada,\n"))
    text = signature.encode_arguments((), given, where="row 1")
    assert signature.decode_arguments(text, where="row 1") == ((Lead(1, "Ada", None),), {})
