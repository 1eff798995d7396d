"""Hooks for events: called in a thread of their own, whatever they do."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from outbox.errors import ConfigError
from tests.forks import ended
from tests.waiting import wait_until
from worker import events, on_event
from worker.definitions import collecting
from worker.engine import hooks
from worker.engine.hooks import Hooks

MOMENT = datetime(2026, 11, 28, tzinfo=UTC)


def event(dead: int = 1) -> events.Event:
    return events.WorkerReclaimed(at=MOMENT, worker=7, dead=dead, detector="lease", tasks=3)


@contextmanager
def telling(*called: Any) -> Iterator[Hooks]:
    started = Hooks(called)
    try:
        yield started
    finally:
        started.close(5)


def test_events_are_told_in_order_to_each_hook_in_one_thread() -> None:
    first: list[Any] = []
    second: list[Any] = []
    threads = set()

    def note(told: events.Event) -> None:
        first.append(told)
        threads.add(threading.current_thread().name)

    with telling(note, second.append) as started:
        for dead in range(50):
            started.tell(event(dead))
    assert [each.dead for each in first] == list(range(50))
    assert second == first
    assert threads == {"stepwell events"}


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()])
def test_a_hook_that_raises_is_told_of_and_the_others_are_called(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[events.Event] = []

    def failing(_: events.Event) -> None:
        raise error

    with telling(failing, told.append) as started:
        started.tell(event())
        started.tell(event())
    assert len(told) == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith("failing failed at WorkerReclaimed")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("raised", "status"), [(SystemExit(3), 3), (ValueError("no"), 1), (None, 0)])
def test_a_process_that_a_hook_forks_ends_with_the_hook(raised: BaseException | None, status: int) -> None:
    """It would call the hooks with what waits for them, as the first one does, and fork again."""
    children: list[int] = []

    def forking(_: events.Event) -> None:
        child = os.fork()
        if child:
            children.append(child)
        elif raised is not None:
            raise raised

    with telling(forking) as started:
        started.tell(event())
        wait_until(lambda: children != [])
    with ended(children[0]) as seen:
        assert seen == status


class _Broken:
    """A hook that fails, and cannot say what it is."""

    def __call__(self, _: events.Event) -> None:
        raise ValueError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("broken", ["the text of a hook", "the logs"])
def test_what_cannot_be_logged_of_a_hook_ends_no_others(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[events.Event] = []

    def refusing(_: logging.LogRecord) -> bool:
        raise RuntimeError("no logs")

    log = logging.getLogger("worker.engine.hooks")
    if broken == "the logs":
        log.addFilter(refusing)
    try:
        with telling(_Broken(), told.append) as started:
            started.tell(event())
            started.tell(event())
    finally:
        log.removeFilter(refusing)
    assert len(told) == 2
    if broken == "the text of a hook":
        assert "the hook _Broken failed at WorkerReclaimed" in caplog.text


def test_nobody_waits_for_a_hook(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(hooks, "MOST_WAITING", 10)
    entered, go_on = threading.Event(), threading.Event()
    told: list[Any] = []

    def slow(each: events.Event) -> None:
        entered.set()
        assert go_on.wait(20)
        told.append(each)

    with telling(slow) as started:
        started.tell(event(0))
        assert entered.wait(20)
        for dead in range(1, 31):
            started.tell(event(dead))  # returns at once
        assert told == []
        go_on.set()
        wait_until(lambda: len(told) == 11)
        started.tell(event(99))
        wait_until(lambda: len(told) == 12)
    assert [each.dead for each in told] == [*range(11), 99]
    assert "20 events were dropped" in caplog.text


def test_a_hook_that_never_returns_holds_up_no_end(caplog: pytest.LogCaptureFixture) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def stuck(_: events.Event) -> None:
        entered.set()
        go_on.wait(20)

    started = Hooks([stuck])
    for _ in range(3):
        started.tell(event())
    assert entered.wait(20)
    started.close(0.05)
    assert "at the end 2 events were not told" in caplog.text
    started.close(0.05)
    started.tell(event())
    go_on.set()
    started._thread.join(20)
    assert not started._thread.is_alive()


def test_what_waits_is_told_before_the_end() -> None:
    told: list[events.Event] = []
    with telling(told.append) as started:
        for dead in range(100):
            started.tell(event(dead))
    assert len(told) == 100
    assert not started._thread.is_alive()


def test_hooks_belong_to_the_registry_that_is_loaded() -> None:
    with collecting() as registry:

        @on_event
        def first(_: events.Event) -> None: ...

        second = on_event(lambda _: None)
        on_event(first)
    assert registry.hooks == [second, first]
    assert on_event.__doc__


def test_hooks_that_are_made_in_one_place_are_all_called() -> None:
    with collecting() as registry:
        for number in range(3):
            on_event(_made(number))
    assert len(registry.hooks) == 3


def _made(number: int) -> Any:
    def hook(_: events.Event) -> int:
        return number

    return hook


async def _asynchronous(_: events.Event) -> None: ...


def _generating(_: events.Event) -> Iterator[int]:
    yield 1


class _Asynchronous:
    async def __call__(self, _: events.Event) -> None: ...


@pytest.mark.parametrize(
    "hook",
    [_asynchronous, _generating, _Asynchronous(), functools.partial(_asynchronous), lambda: None, 17, "tell"],
)
def test_what_cannot_be_called_plainly_is_refused(hook: Any) -> None:
    with pytest.raises(ConfigError, match="on_event takes a plain function"):
        on_event(hook)


def test_an_event_says_what_it_is() -> None:
    assert "dead=1" in repr(event())
    with pytest.raises(AttributeError):
        setattr(event(), "worker", 3)  # noqa: B010 - a type checker refuses the statement
