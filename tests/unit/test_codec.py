"""The codec: what comes back, what is refused and where, what is an error at import."""

from __future__ import annotations

import enum
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.codec import Signature, decode, encode, fingerprint
from outbox.errors import ConfigError, PayloadError

WHERE = "input of workflow 'welcome_lead'"


class Source(enum.Enum):
    WEB = "web"
    FAIR = "fair"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    name: str


class Span(NamedTuple):
    start: int
    end: int


class Extra(TypedDict, total=False):
    note: str


class Model(pydantic.BaseModel):
    id: int
    at: datetime | None = None
    share: float = pydantic.Field(default=1.0, alias="part")


class StrictModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    day: date
    id: UUID


@dataclass(frozen=True)
class Address:
    city: str
    zip: str | None = None


@dataclass
class Lead:
    id: int
    name: str
    emails: list[str] = field(default_factory=list)
    address: Address | None = None
    score: float = 0.0
    source: Source = Source.WEB


@dataclass(slots=True)
class Node:
    value: int
    next: Node | None = None


@dataclass
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("number must be even")


@dataclass
class Failure(Exception):
    code: int


class Opaque:
    pass


def round_trip(value: Any, type_: Any) -> Any:
    text = encode(value, where=WHERE)
    assert json.loads(text) == json.loads(encode(decode(text, where=WHERE), where=WHERE))
    decoded = decode(text, type_, where=WHERE)
    assert encode(decoded, where=WHERE) == text
    return decoded


# --- what comes back --------------------------------------------------------------------------------------------

carried_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | carried_text,
    lambda inner: st.lists(inner) | st.dictionaries(carried_text, inner),
    max_leaves=20,
)
leads = st.builds(
    Lead,
    id=st.integers(),
    name=carried_text,
    emails=st.lists(carried_text),
    address=st.none() | st.builds(Address, city=carried_text, zip=st.none() | carried_text),
    score=st.floats(allow_nan=False, allow_infinity=False),
    source=st.sampled_from(Source),
)


@given(plain)
def test_plain_json_comes_back_as_it_went_in(value: Any) -> None:
    assert round_trip(value, Any) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_as_the_same_float(value: float) -> None:
    decoded = decode(encode([value], where=WHERE), where=WHERE)[0]
    assert type(decoded) is float
    assert math.copysign(1, decoded) == math.copysign(1, value)
    assert decoded == value


@given(leads)
def test_dataclasses_come_back_equal(lead: Lead) -> None:
    assert round_trip(lead, Lead) == lead


@given(st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones()))
def test_a_moment_comes_back_or_is_refused(moment: datetime) -> None:
    try:
        decoded = decode(encode(moment, where=WHERE), datetime, where=WHERE)
    except PayloadError as error:
        assert "offset from UTC with seconds" in str(error)  # noqa: PT017 - local mean times; the others come back
        return
    assert decoded.utcoffset() == moment.utcoffset()
    assert decoded.replace(tzinfo=None) == moment.replace(tzinfo=None)


@given(
    st.dates(), st.timedeltas(), st.uuids(), st.decimals(allow_nan=False, allow_infinity=False), st.binary()
)
def test_typed_scalars_come_back_equal(
    day: date, span: timedelta, id: UUID, amount: Decimal, raw: bytes
) -> None:
    for value in (day, span, id, amount, raw):
        assert round_trip(value, type(value)) == value
    assert str(round_trip(amount, Decimal)) == str(amount)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (time(12, 30, 1, 5), time),
        (Level.HIGH, Level),
        (Point(1.5), Point),
        ([Cat(9), Dog("Rex")], list[Cat | Dog]),
        (Span(1, 2), Span),
        ({"note": "x"}, Extra),
        (Node(1, Node(2)), Node),
        ({"a": [Address("Oslo")]}, dict[str, list[Address]]),
        ((1, "a"), tuple[int, str]),
        ({3, 1, 2}, set[int]),
        pytest.param(frozenset({"b", "a"}), frozenset[str], id="a frozen set"),
        (7, int | str | None),
        ("x", int | str | None),
        (None, Address | None),
        ("b", Literal["a", "b"]),
        (5, Annotated[int, msgspec.Meta(gt=3)]),
        (Model(id=1, at=datetime(2026, 1, 2, tzinfo=UTC)), Model),
        ([None, Model(id=1)], list[Model | None]),
        (StrictModel(day=date(2026, 1, 2), id=UUID(int=5)), StrictModel),
        (datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Oslo")), datetime),
    ],
    ids=repr,
)
def test_typed_values_come_back_equal(value: Any, type_: Any) -> None:
    assert round_trip(value, type_) == value


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 10**3999])
def test_integers_of_any_size_stay_integers(number: int) -> None:
    for type_ in (Any, int):
        decoded = decode(encode(number, where=WHERE), type_, where=WHERE)
        assert type(decoded) is int
        assert decoded == number


def test_the_text_of_a_float_stays_the_text_of_a_float() -> None:
    assert encode({"a": 1e16, "b": 1.0}, where=WHERE) == '{"a":1e16,"b":1.0}'
    assert type(decode("1e16", where=WHERE)) is float


def test_the_order_of_keys_is_kept() -> None:
    assert list(decode(encode({"b": 1, "a": 2}, where=WHERE), where=WHERE)) == ["b", "a"]


def test_without_a_type_dates_and_bytes_are_text() -> None:
    assert decode(encode([date(2026, 1, 2), b"\xff"], where=WHERE), where=WHERE) == ["2026-01-02", "/w=="]


def test_a_set_is_written_alike_in_every_process() -> None:
    program = "from outbox.codec import encode; print(encode({'s': {'a', 'b', 'c', 'd'}}, where='w'))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert texts == {'{"s":["a","b","c","d"]}\n'}


def test_an_escaped_backslash_before_u0000_is_no_nul() -> None:
    assert round_trip({"path": "C:\\u0000"}, Any) == {"path": "C:\\u0000"}


# --- what is refused, and where ---------------------------------------------------------------------------------

endless: list[Any] = []
endless.append(endless)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), f"{WHERE}: is NaN or infinite"),
        ({"a": [1.0, float("inf")]}, f"{WHERE}, field a[1]: is NaN or infinite"),
        (Decimal("sNaN"), f"{WHERE}: is NaN or infinite"),
        (Point(0.0, float("-inf")), f"{WHERE}, field y: is NaN or infinite"),
        (Lead(1, "a", score=float("nan")), f"{WHERE}, field score: is NaN or infinite"),
        (Model(id=1, part=float("nan")), f"{WHERE}, field part: is NaN or infinite"),
        ({"a": {1: "x"}}, f"{WHERE}, field a: has a key of type `int`"),
        ({Source.WEB: 1}, f"{WHERE}: has a key of type `tests.unit.test_codec.Source`"),
        ({None: 1}, f"{WHERE}: has a key of type `NoneType`"),
        ("a\0b", f"{WHERE}: contains a NUL character"),
        (Lead(1, "a", address=Address("Os\0lo")), f"{WHERE}, field address.city: contains a NUL"),
        ({"a\0": 1}, f"{WHERE}: has a key that contains a NUL character"),
        (
            Lead(1, "a", emails=["x", "\ud800"]),
            f"{WHERE}, field emails[1]: contains a lone surrogate (U+D800)",
        ),
        ({"\udfff": 1}, f"{WHERE}: has a key that contains a lone surrogate"),
        ({"a": Opaque()}, f"{WHERE}, field a: an object of type `tests.unit.test_codec.Opaque` cannot"),
        ([1, print], f"{WHERE}, field [1]: an object of type `builtin_function_or_method` cannot"),
        (3 + 4j, f"{WHERE}: an object of type `complex` cannot"),
        ({"a": 10**5000}, f"{WHERE}, field a: is an integer of more than 4,000 digits"),
        (endless, f"{WHERE}: refers to itself, or is nested too deeply"),
        ({Address("Oslo"), Address("Bergen")}, f"{WHERE}: is a set whose members have no order"),
        (msgspec.Raw(b"{"), f"{WHERE}: is raw JSON"),
        (
            [datetime(1900, 1, 1, tzinfo=timezone(timedelta(minutes=53, seconds=28)))],
            f"{WHERE}, field [0]: has an offset from UTC with seconds in it",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_what_cannot_be_carried_is_refused_by_its_field(value: Any, says: str) -> None:
    with pytest.raises(PayloadError) as caught:
        encode(value, where=WHERE)
    assert str(caught.value).startswith(says)
    inside = says.partition(", field ")[2].partition(":")[0]
    assert caught.value.field == inside


def test_too_large_a_payload_names_the_part_that_makes_it_large() -> None:
    value = {"lead": {"id": 1, "photo": "x" * 2_000}, "note": "y"}
    encode(value, where=WHERE, max_bytes=3_000)
    with pytest.raises(PayloadError, match=r"field lead\.photo: too large: 2,\d\d\d bytes .* is 1,000"):
        encode(value, where=WHERE, max_bytes=1_000)


def test_the_limit_counts_bytes_not_characters() -> None:
    encode("x" * 8, where=WHERE, max_bytes=10)
    with pytest.raises(PayloadError, match="18 bytes"):
        encode("é" * 8, where=WHERE, max_bytes=10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id":"x","name":"a"}', f"{WHERE}, field id: expected `int`, got `str`"),
        ('{"name":"a"}', f"{WHERE}, field id: is missing"),
        ('{"id":1,"name":"a","address":{}}', f"{WHERE}, field address.city: is missing"),
        ('{"id":1,"name":"a","emails":["x",2]}', f"{WHERE}, field emails[1]: expected `str`, got `int`"),
        ('{"id":1,"name":"a","source":"tv"}', f"{WHERE}, field source: invalid enum value 'tv'"),
        ("[]", f"{WHERE}: expected `object`, got `array`"),
        ('{"id":1', f"{WHERE}: is not valid JSON"),
        ("", f"{WHERE}: is not valid JSON"),
        ('{"id":1,"name":"a"} {}', f"{WHERE}: is not valid JSON"),
        ('{"id":NaN}', f"{WHERE}: is not valid JSON"),
        ('{"id":1,"name":"a\\u0000"}', f"{WHERE}, field name: contains a NUL character"),
        ('{"id":1,"name":"\\ud800"}', f"{WHERE}: is not valid JSON"),
        (b'{"id":1,"name":"\xff"}', f"{WHERE}: is not valid JSON"),
        ('{"id":1,"name":"\ud800"}', f"{WHERE}: is not valid JSON"),
    ],
)
def test_text_that_does_not_fit_is_refused_by_its_field(text: str | bytes, says: str) -> None:
    with pytest.raises(PayloadError) as caught:
        decode(text, Lead, where=WHERE)
    assert str(caught.value).startswith(says)


def test_text_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(PayloadError, match="nested too deeply"):
        decode("[" * 100_000 + "]" * 100_000, where=WHERE)


def test_a_dataclass_may_refuse_its_own_values() -> None:
    assert decode('[{"number":2}]', list[Even], where=WHERE) == [Even(2)]
    with pytest.raises(PayloadError, match=r"field \[0\]: number must be even"):
        decode('[{"number":3}]', list[Even], where=WHERE)


def test_a_pydantic_model_says_which_of_its_fields() -> None:
    with pytest.raises(PayloadError, match=r"field lead\.id: input should be a valid integer"):
        Signature.of(of_model).decode_arguments('{"lead":{"id":"x"}}', where=WHERE)


def test_a_type_that_nothing_decodes_to_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Opaque"):
        decode("{}", Opaque, where=WHERE)


def test_pydantic_is_never_imported_by_the_codec() -> None:
    program = "import sys, outbox.codec; outbox.codec.encode({'a': {1, 2}}, where='w'); assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- fingerprints -----------------------------------------------------------------------------------------------


@given(plain)
def test_a_fingerprint_is_a_signed_64_bit_integer_of_the_value(value: Any) -> None:
    mark = fingerprint(encode(value, where=WHERE))
    assert -(2**63) <= mark < 2**63
    if not isinstance(value, str):
        assert mark == fingerprint(value)


def test_a_fingerprint_ignores_the_order_of_keys_and_white_space() -> None:
    assert fingerprint('{"a":1,"b":{"c":2,"d":3}}') == fingerprint('{ "b": {"d":3, "c":2}, "a": 1 }')
    assert fingerprint('{"a":1}') != fingerprint('{"a":2}')
    assert fingerprint("[1,2]") != fingerprint("[2,1]")


def test_a_fingerprint_never_changes() -> None:
    assert fingerprint('{"lead":{"id":17}}') == 5543339380179130990


# --- signatures -------------------------------------------------------------------------------------------------


def positional(lead: Lead, times: int = 3) -> str:
    return ""


def keyword_only(lead: Lead, /, note: str = "", *, urgent: bool, tags: list[str] = ["new"]) -> int:  # noqa: B006
    return 0


async def untyped(lead, n=1):  # type: ignore[no-untyped-def]
    return None


def of_model(lead: Model) -> Model:
    return lead


def needs_later(item: Later) -> Later:
    return item


@dataclass
class Later:
    id: int


def test_arguments_are_an_object_by_parameter_name_with_defaults() -> None:
    signature = Signature.of(positional)
    text = signature.encode_arguments((Lead(1, "Ada"),), {}, where=WHERE)
    assert json.loads(text) == {
        "lead": {"id": 1, "name": "Ada", "emails": [], "address": None, "score": 0.0, "source": "web"},
        "times": 3,
    }
    assert signature.decode_arguments(text, where=WHERE) == ((Lead(1, "Ada"), 3), {})
    assert (signature.parameters, signature.returns) == (("lead", "times"), str)


def test_keyword_only_parameters_are_called_by_keyword() -> None:
    signature = Signature.of(keyword_only)
    text = signature.encode_arguments((Lead(1, "Ada"), "hi"), {"urgent": True}, where=WHERE)
    args, kwargs = signature.decode_arguments(text, where=WHERE)
    assert (args, kwargs) == ((Lead(1, "Ada"), "hi"), {"urgent": True, "tags": ["new"]})
    assert keyword_only(*args, **kwargs) == 0


def test_a_default_is_a_new_object_for_every_call() -> None:
    signature = Signature.of(keyword_only)
    text = '{"lead":{"id":1,"name":"a"},"urgent":false}'
    signature.decode_arguments(text, where=WHERE)[1]["tags"].append("changed")
    assert signature.decode_arguments(text, where=WHERE)[1]["tags"] == ["new"]


def test_without_annotations_values_are_plain_json() -> None:
    signature = Signature.of(untyped)
    text = signature.encode_arguments((Lead(1, "Ada"),), {}, where=WHERE)
    (lead, n), _ = signature.decode_arguments(text, where=WHERE)
    assert (lead["name"], n, signature.returns) == ("Ada", 1, Any)


def test_self_and_sessions_can_be_left_out() -> None:
    class Onboarding:
        def welcome(self, session: Opaque, lead: Lead) -> None: ...

    signature = Signature.of(Onboarding.welcome, skip_first=2)
    assert signature.parameters == ("lead",)


def test_a_skipped_annotation_need_not_exist() -> None:
    def save(session: OnlyUnderTypeChecking, n: int) -> int:  # type: ignore[name-defined]  # noqa: F821
        return n

    assert Signature.of(save, skip_first=1).encode_arguments((4,), {}, where=WHERE) == '{"n":4}'


def test_a_class_further_down_is_found_at_the_first_call() -> None:
    signature = Signature.of(needs_later)
    assert signature.decode_arguments('{"item":{"id":1}}', where=WHERE) == ((Later(1),), {})


def test_a_name_that_does_not_exist_is_explained_at_the_first_call() -> None:
    def broken(item: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    signature = Signature.of(broken)
    with pytest.raises(ConfigError, match=r"parameter 'item' of .*broken.* 'Nowhere', which cannot be found"):
        signature.encode_arguments((1,), {}, where=WHERE)


def test_a_local_class_is_found_if_the_function_uses_it() -> None:
    @dataclass
    class Local:
        id: int

    def make(item: Local) -> Local:
        return Local(item.id)

    assert Signature.of(make).decode_arguments('{"item":{"id":1}}', where=WHERE) == ((Local(1),), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, f"{WHERE}: missing a required argument: 'lead'"),
        ((1, 2, 3), {}, f"{WHERE}: too many positional arguments"),
        ((1,), {"lead": 2}, f"{WHERE}: multiple values for argument 'lead'"),
        ((1,), {"color": 2}, f"{WHERE}: got an unexpected keyword argument 'color'"),
        ((Lead(1, "a\0"),), {}, f"{WHERE}, field lead.name: contains a NUL character"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Signature.of(positional).encode_arguments(args, kwargs, where=WHERE)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("given_input", "says"),
    [
        ("{}", "field lead: is missing"),
        ('{"lead":{"id":1,"name":"a"},"color":1}', "field color: no such field is known here"),
        ('{"lead":{"id":"1","name":"a"}}', "field lead.id: expected `int`, got `str`"),
        ('{"lead":{"id":1,"name":"a"},"times":null}', "field times: expected `int`, got `null`"),
        ("[1]", "expected `object`, got `array`"),
        ({"lead": {"id": 1}}, "field lead.name: is missing"),
    ],
)
def test_an_input_is_checked_like_it_is_decoded(given_input: Any, says: str) -> None:
    signature = Signature.of(positional)
    with pytest.raises(PayloadError) as caught:
        signature.check_input(given_input, where=WHERE)
    assert str(caught.value).endswith(says)
    text = given_input if isinstance(given_input, str) else json.dumps(given_input)
    with pytest.raises(PayloadError) as again:
        signature.decode_arguments(text, where=WHERE)
    assert str(again.value) == str(caught.value)


def test_an_input_that_fits_passes_the_check() -> None:
    signature = Signature.of(positional)
    signature.check_input({"lead": Lead(1, "Ada")})
    signature.check_input('{"lead": {"id": 1, "name": "Ada"}, "times": 2}')


def test_results_come_back_by_annotation() -> None:
    signature = Signature.of(of_model)
    text = signature.encode_result(Model(id=1), where="result of step 'of_model'")
    assert signature.decode_result(text, where="result of step 'of_model'") == Model(id=1)
    with pytest.raises(PayloadError, match="result of step 'of_model'"):
        signature.decode_result("3", where="result of step 'of_model'")


def never() -> NoReturn:
    raise SystemExit


def any_arguments(*leads: Lead) -> None: ...
def any_keywords(**leads: Lead) -> None: ...
def int_keys(names: dict[int, str]) -> None: ...
def implicit_none(n: int = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013
def bad_default(tags: list[Any] = [Opaque()]) -> None: ...  # noqa: B006, B008
def opaque(it: Opaque | None) -> None: ...
def nested_opaque(it: dict[str, list[Opaque]]) -> None: ...
def exception(it: Failure) -> None: ...
def ambiguous(it: Lead | Address) -> None: ...
def callback(it: Callable[[], None]) -> None: ...
def opaque_result() -> Opaque: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (any_arguments, r"`any_arguments` takes \*leads"),
        (any_keywords, r"`any_keywords` takes \*\*leads"),
        (int_keys, "parameter 'names' of `int_keys`: the keys of a dict must be `str`"),
        (implicit_none, "default of parameter 'n' of `implicit_none`: expected `int`, got `null`"),
        (bad_default, r"default of parameter 'tags' of `bad_default`, field \[0\]: an object of type"),
        (opaque, "parameter 'it' of `opaque`: `Opaque` cannot be decoded from JSON"),
        (nested_opaque, "parameter 'it' of `nested_opaque`: `Opaque` cannot be decoded from JSON"),
        (exception, "parameter 'it' of `exception`: the exception `Failure` cannot be a payload"),
        (ambiguous, "parameter 'it' of `ambiguous`: Type unions may not contain more than one dataclass"),
        (callback, "parameter 'it' of `callback`: `Callable` cannot be decoded"),
        (opaque_result, "the result of `opaque_result`: `Opaque` cannot be decoded"),
    ],
)
def test_what_json_cannot_carry_is_an_error_at_import(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Signature.of(function)


def test_a_function_that_never_returns_has_a_signature() -> None:
    assert Signature.of(never).returns is Any


def test_the_schema_describes_the_input() -> None:
    schema = Signature.of(positional).json_schema()
    top = schema["$defs"]["positional"]
    assert top["required"] == ["lead"]
    assert top["properties"]["times"] == {"type": "integer", "default": 3}
    assert schema["$defs"]["Lead"]["properties"]["id"] == {"type": "integer"}
    assert "part" in json.dumps(Signature.of(of_model).json_schema())


def test_recursive_types_can_be_parameters() -> None:
    def walk(node: Node) -> int:
        return node.value

    text = '{"node":{"value":1,"next":{"value":2}}}'
    assert Signature.of(walk).decode_arguments(text, where=WHERE) == ((Node(1, Node(2)),), {})


def test_decoding_one_text_twice_gives_equal_and_separate_values() -> None:
    read = partial(Signature.of(positional).decode_arguments, '{"lead":{"id":1,"name":"a"}}', where=WHERE)
    first, second = read()[0][0], read()[0][0]
    assert first == second
    assert first is not second
    assert first.emails is not second.emails


def test_a_local_function_may_close_over_itself_and_over_what_comes_later() -> None:
    def countdown(n: int) -> int:
        return later if n == 0 else countdown(n - 1)

    signature = Signature.of(countdown)
    later = 7
    assert signature.decode_arguments('{"n": 3}', where="input") == ((3,), {})
    assert countdown(3) == 7
