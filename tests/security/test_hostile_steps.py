"""What steps and bodies may come up with: hostile values and errors harm their run and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from outbox import Client
from tests.engines import Lab, keep_house_often
from tests.security.hostile import TEXTS
from worker import emit, retrying, set_state, step, workflow
from worker.definitions import collecting


@pytest_asyncio.fixture
async def lab(database_url: str) -> AsyncIterator[Lab]:
    async with Lab(database_url) as opened:
        yield opened


class LyingMapping(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no items of mine")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no keys of mine")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not a word")

    __repr__ = __str__


class Leaving(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Bottomless(Exception):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"you want {name}")


class Payload(Exception):
    def to_payload(self) -> Any:
        return {"a": [float("nan"), "\ud800", object()]}

    @classmethod
    def from_payload(cls, data: Any) -> Payload:
        raise RuntimeError("never again")


class Encoding(Exception):
    @property
    def to_payload(self) -> Any:
        raise RuntimeError("no payload of mine")


@dataclass
class Field:
    value: Any


@dataclass
class Broken:
    value: int = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "value":
            raise Unspeakable
        return super().__getattribute__(name)


@dataclass
class Leaver:
    value: int = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "value":
            raise SystemExit(3)
        return super().__getattribute__(name)


def endless() -> list[Any]:
    itself: list[Any] = []
    itself.append(itself)
    return itself


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def with_cause(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def with_notes(error: BaseException, notes: Any) -> BaseException:
    error.__notes__ = notes
    return error


def in_circles() -> BaseException:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one
    return one


REFUSED: dict[str, Callable[[], Any]] = {
    "NUL": lambda: "a\0b",
    "half a character": lambda: "\ud800",
    "a key that is half a character": lambda: {"\udfff": 1},
    "a key with NUL": lambda: {"a\0": 1},
    "NaN": lambda: float("nan"),
    "infinite": lambda: [float("-inf")],
    "itself": endless,
    "10,000 levels": lambda: nested(10_000),
    "5,000 digits": lambda: 10**5000,
    "2 MB": lambda: "x" * 2**21,
    "2 MB in small parts": lambda: ["x" * 10] * 200_000,
    "an object": object,
    "a class": lambda: int,
    "a function": lambda: print,
    "an exception": lambda: ValueError("x"),
    "a generator": lambda: (n for n in range(3)),
    "a broken property": Broken,
    "a property that leaves": Leaver,
    "a field with NaN": lambda: Field(float("nan")),
    "an object in a field": lambda: Field(object()),
    "a key that is no text": lambda: {1: 2},
    "a lying mapping": lambda: LyingMapping(a=1),
}

ERRORS: dict[str, Callable[[], BaseException]] = {
    "NUL": lambda: ValueError("a\0b"),
    "half a character": lambda: ValueError("\ud800 \udfff"),
    "control characters": lambda: ValueError("\x1b[2J\x1b]0;mine\x07\r\n\x9b31m\u202e"),
    "10 MB": lambda: ValueError("x" * 10 * 2**20),
    "10 MB of arguments": lambda: ValueError(*["x" * 1000] * 10_000),
    "unspeakable": Unspeakable,
    "unspeakable as a cause": lambda: with_cause(ValueError("x"), Unspeakable()),
    "leaving when asked": Leaving,
    "an attribute that raises": Bottomless,
    "a payload that cannot be written": Payload,
    "a property that raises": Encoding,
    "no text at all": ValueError,
    "bytes": lambda: ValueError(b"\xff\xfe"),
    "an exit": lambda: SystemExit("\0"),
    "an interrupt": KeyboardInterrupt,
    "a generator's exit": GeneratorExit,
    "a name with NUL": lambda: type("Bad\ud800Name", (Exception,), {})("x"),
    "a name of a megabyte": lambda: type("N" * 2**20, (Exception,), {})("x"),
    "a module that is no text": lambda: type("Odd", (Exception,), {"__module__": None})("x"),
    "a group": lambda: ExceptionGroup("\0", [ValueError("\ud800"), Unspeakable()]),
    "a deep group": lambda: _deep_group(60),
    "in circles": in_circles,
    "notes": lambda: with_notes(ValueError("x"), ["\0", "\ud800", "n" * 2**20]),
    "notes that are none": lambda: with_notes(ValueError("x"), 17),
    "format characters": lambda: ValueError("%s %(x)s {} {0.__class__} [bold]x[/bold]"),
}


def error_of(name: str) -> BaseException:
    return ERRORS[name]()


def _deep_group(levels: int) -> BaseException:
    error: Exception = ValueError("x")
    for _ in range(levels):
        error = ExceptionGroup("g", [error])
    return error


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_step_that_returns_what_cannot_be_carried_fails_its_run_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    keep_house_often(monkeypatch)
    with collecting() as registry:
        if is_async:

            @step
            async def give(name: str) -> Any:
                return REFUSED[name]() if name in REFUSED else name
        else:

            @step
            def give(name: str) -> Any:  # type: ignore[misc]
                return REFUSED[name]() if name in REFUSED else name

        @workflow
        async def plan(name: str) -> Any:
            return await give(name) if is_async else give(name)

    async with lab.engine(registry, grace_seconds=2.0) as running:
        runs = {name: await lab.enqueue(plan, {"name": name}) for name in REFUSED}
        good = [await lab.enqueue(plan, {"name": f"good {n}"}) for n in range(10)]
        for n, run in enumerate(good):
            assert await lab.succeeded(run) == f"good {n}"
        for name, run in runs.items():
            state, _, error = await lab.ended(run)
            assert state == "failed", (name, state, error)
            wanted = "SystemExit" if name == "a property that leaves" else "outbox.errors.PayloadError"
            assert error["type"] == wanted, (name, error["message"])
            assert len(str(error)) < 50_000, name
        assert not running.task.done()
        assert running.engine._claimant.connections == 1


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_step_that_raises_what_cannot_be_told_fails_its_run_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    keep_house_often(monkeypatch)
    tries: list[str] = []
    retry = retrying(stop=_after(2), wait=_at_once())
    with collecting() as registry:
        if is_async:

            @step(retry=retry)
            async def fails(name: str) -> Any:
                tries.append(name)
                if name in ERRORS:
                    raise error_of(name)
                return name
        else:

            @step(retry=retry)
            def fails(name: str) -> Any:  # type: ignore[misc]
                tries.append(name)
                if name in ERRORS:
                    raise error_of(name)
                return name

        @workflow
        async def plan(name: str) -> Any:
            return await fails(name) if is_async else fails(name)

    async with lab.engine(registry, grace_seconds=2.0) as running:
        runs = {name: await lab.enqueue(plan, {"name": name}) for name in ERRORS}
        good = [await lab.enqueue(plan, {"name": f"good {n}"}) for n in range(10)]
        for n, run in enumerate(good):
            assert await lab.succeeded(run) == f"good {n}"
        for name, run in runs.items():
            state, _, error = await lab.ended(run)
            assert state == "failed", (name, state, error)
            assert len(str(error)) < 50_000, name
            assert tries.count(name) >= 1
        assert not running.task.done()
    with Client(lab.url) as client:
        assert len(client.list(limit=1000)) == len(runs) + len(good)
        for run in runs.values():
            client.history(run)


async def test_a_body_that_raises_what_cannot_be_told_fails_its_run_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    with collecting() as registry:

        @workflow
        async def plan(name: str) -> Any:
            if name in ERRORS:
                raise error_of(name)
            return REFUSED[name]() if name in REFUSED else name

    async with lab.engine(registry, grace_seconds=2.0) as running:
        runs = {name: await lab.enqueue(plan, {"name": name}) for name in {**ERRORS, **REFUSED}}
        good = [await lab.enqueue(plan, {"name": f"good {n}"}) for n in range(10)]
        for n, run in enumerate(good):
            assert await lab.succeeded(run) == f"good {n}"
        for name, run in runs.items():
            state, _, error = await lab.ended(run)
            assert state in ("failed", "blocked"), (name, state)
            assert len(str(error)) < 50_000, name
        assert not running.task.done()


async def test_the_class_of_an_error_forges_no_line_of_the_log(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name is what the log has of it, and a step may have made it of what came in."""
    with collecting() as registry:

        @step
        async def fails(text: str) -> None:
            raise type(text, (Exception,), {})

        @workflow
        async def failing(text: str) -> None:
            await fails(text)

    name = "X\n2026-11-28 00:00:00,000 CRITICAL 1 root: FORGED\x1b[2J\u202e"
    with caplog.at_level("DEBUG"):
        async with lab.engine(registry):
            ended = await lab.ended(await lab.enqueue(failing, {"text": name}))
    assert ended.error["type"].isprintable()
    told = [record.getMessage() for record in caplog.records]
    assert [said for said in told if "FORGED" in said], "the log names the class"
    assert all(said.isprintable() for said in told)


async def test_states_and_streams_take_any_text_as_a_value_and_refuse_it_as_a_name(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_house_often(monkeypatch)
    with collecting() as registry:

        @workflow
        async def shows(number: int) -> list[str]:
            refused = []
            text = TEXTS[number]
            for function in (set_state, emit):
                try:
                    function(text, "value")
                except ValueError:
                    refused.append(function.__name__)
                try:
                    function("name", text)
                except Exception as error:
                    refused.append(type(error).__name__)
            return refused

    async with lab.engine(registry) as running:
        runs = [await lab.enqueue(shows, {"number": number}) for number in range(len(TEXTS))]
        with Client(lab.url) as client:
            for run, text in zip(runs, TEXTS, strict=True):
                storable = "\0" not in text and text.encode(errors="replace").decode() == text
                ended = await lab.ended(run)
                assert ended.state == "succeeded", (text, ended)
                assert ("PayloadError" in ended.output) != storable, text
                state = await asyncio.to_thread(client.state, run)
                assert state.get("name") == (text if storable else None)
                if "set_state" not in ended.output and text != "name":
                    assert state[text] == "value"
                items = [i.value for i in client.stream(run, "name", follow=False)] if text != "name" else []
                assert items == ([text] if storable else [])
        assert not running.task.done()


def _after(attempts: int) -> Any:
    from tenacity import stop_after_attempt

    return stop_after_attempt(attempts)


def _at_once() -> Any:
    from tenacity import wait_none

    return wait_none()
