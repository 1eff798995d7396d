"""What systemd is told, and when: with a real datagram socket, and supervisors that only say how they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.engine.vitals import Vitals
from worker.supervision.supervisor import ChildVitals, SupervisorVitals
from worker.supervision.systemd import NOT_CLAIMING_SECONDS, NotifySocket, Reporter


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket as systemd listens on one, and its name as systemd hands it down."""
    path = str(tmp_path / "notify")
    name = path if request.param == "path" else f"@stepwell-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1) if name[0] == "@" else name)
        listener.settimeout(5)
        yield name, listener


def test_a_message_is_one_datagram(
    listening: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, listener = listening
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    systemd = NotifySocket.from_environment()
    assert systemd is not None
    assert systemd.send("READY=1")
    assert listener.recv(4096) == b"READY=1"


def test_nobody_else_inherits_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert NotifySocket.from_environment() == NotifySocket("/run/nowhere", 30.0)
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    assert NotifySocket.from_environment() is None


@pytest.mark.parametrize("name", ["", "vsock:2:1", "relative"])
def test_another_kind_of_socket_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert NotifySocket.from_environment() is None


@pytest.mark.parametrize(
    ("micros", "pid", "seconds"),
    [("2000000", "", 2.0), ("2000000", "1", None), ("", "", None), ("0", "", None), ("soon", "", None)],
)
def test_the_watchdog_is_fed_only_by_the_process_that_it_watches(
    micros: str, pid: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", micros)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert NotifySocket.from_environment() == NotifySocket("/run/nowhere", seconds)


def test_a_socket_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not NotifySocket(str(tmp_path / "gone")).send("READY=1")


# -- what is said ------------------------------------------------------------------------------------


class Heard:
    """Takes messages as systemd would, or refuses them."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.deaf = False

    def __call__(self, message: str) -> bool:
        if not self.deaf:
            self.messages.append(message)
        return not self.deaf

    def but_status(self) -> list[str]:
        return [each for each in self.messages if not each.startswith("STATUS=")]


def vitals(*claiming: bool, connected: bool = True, ending: bool = False) -> SupervisorVitals:
    children = tuple(
        ChildVitals(pid, pid, each, Vitals(0, 0, 0, connected=True, claiming=each, in_flight=0))
        for pid, each in enumerate(claiming, 100)
    )
    return SupervisorVitals(
        alive=True,
        connected=connected,
        schema_ok=True,
        claiming=any(claiming),
        ending=ending,
        children=children,
    )


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_it_is_ready_once_a_worker_claims_and_says_so_once(heard: Heard) -> None:
    reporter = Reporter(heard, None, now=0.0)
    reporter.look(vitals(False, False), 1.0)
    assert heard.but_status() == []
    reporter.look(vitals(False, True), 2.0)
    reporter.look(vitals(True, True), 3.0)
    assert heard.but_status() == ["READY=1"]
    assert heard.messages[-1] == "STATUS=worker processes that claim: 2 of 2"


def test_what_was_not_taken_is_said_again(heard: Heard) -> None:
    reporter = Reporter(heard, None, now=0.0)
    heard.deaf = True
    reporter.look(vitals(True), 1.0)
    heard.deaf = False
    reporter.look(vitals(True), 2.0)
    assert heard.messages == ["READY=1", "STATUS=worker processes that claim: 1 of 1"]


def test_a_sign_of_life_comes_twice_in_the_time_that_is_allowed(heard: Heard) -> None:
    reporter = Reporter(heard, 10.0, now=0.0)
    for second in range(1, 21):
        reporter.look(vitals(True), float(second))
    assert heard.but_status() == ["READY=1", *["WATCHDOG=1"] * 4]


def test_no_sign_of_life_when_no_worker_has_claimed_for_long(heard: Heard) -> None:
    reporter = Reporter(heard, 10.0, now=0.0)
    reporter.look(vitals(True), 1.0)
    reporter.look(vitals(False), NOT_CLAIMING_SECONDS)
    heard.messages.clear()
    reporter.look(vitals(), NOT_CLAIMING_SECONDS + 1.0)
    reporter.look(vitals(False), NOT_CLAIMING_SECONDS + 20.0)
    assert heard.but_status() == []
    reporter.look(vitals(True), NOT_CLAIMING_SECONDS + 21.0)
    assert heard.but_status() == ["WATCHDOG=1"]


def test_a_database_that_is_away_is_no_reason_to_be_restarted(heard: Heard) -> None:
    reporter = Reporter(heard, 10.0, now=0.0)
    for minute in range(1, 61):
        reporter.look(vitals(False, connected=False), 60.0 * minute)
    assert heard.but_status() == ["WATCHDOG=1"] * 60
    assert heard.messages[0] == "STATUS=waiting for the database"


def test_a_drain_is_told_as_it_begins_and_lives_on(heard: Heard) -> None:
    reporter = Reporter(heard, 10.0, now=0.0)
    reporter.look(vitals(True), 1.0)
    heard.messages.clear()
    reporter.look(vitals(False, ending=True), 2.0)
    reporter.look(vitals(False, ending=True), NOT_CLAIMING_SECONDS + 20.0)
    reporter.end(None)
    assert heard.messages == ["STOPPING=1", "STATUS=draining, worker processes left: 1", "WATCHDOG=1"]


def test_an_end_of_its_own_says_why_in_one_line(heard: Heard) -> None:
    Reporter(heard, None, now=0.0).end("the schema is missing:\nrun `stepwell migrate`")
    assert heard.messages == ["STOPPING=1", "STATUS=the schema is missing: run `stepwell migrate`"]
