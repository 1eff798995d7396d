"""What a supervisor and its children say to each other, over one socket pair per child, in lines of JSON.

Down: the briefing, as the first line (never in argv or the environment: it holds the database's password);
later `DEAD`, when the database no longer knows the worker, and news for its hooks of other workers that are dead.
Up: beats, and at most one complaint, the sentence with which a child refuses to start. Its end of file means to either
side that the other is gone.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from outbox.settings import Settings
from worker.engine.vitals import Vitals
from worker.telemetry.logs import LogFormat

FD_VARIABLE = "STEPWELL_SUPERVISOR_FD"
"""Names the inherited end of the socket pair in a child's environment; the child removes it."""

EXIT_DRAINED = 0
EXIT_CRASHED = 1
EXIT_CONFIG = 2
EXIT_DECLARED_DEAD = 75
EXIT_ORPHANED = 76

BEAT_SECONDS = 0.5
LINE_MAX_BYTES = 65_536
COMPLAINT_MAX_CHARACTERS = 4_000

DEAD = b"dead\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Briefing:
    """What a child needs to know to work."""

    settings: Settings
    url: str = field(repr=False)
    app: str
    worker_id: int
    supervisor_id: int
    queues: tuple[str, ...]
    log_level: int = logging.INFO
    log_format: LogFormat = "text"

    def to_line(self) -> bytes:
        """Return the briefing as a line."""
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Briefing:
        """Return the briefing in a line."""
        return msgspec.json.decode(line, type=cls, dec_hook=_read_path)


def _read_path(kind: type, text: Any) -> Path:
    if kind is not Path:
        raise NotImplementedError(f"cannot read {kind}")
    return Path(text)


class News(msgspec.Struct, frozen=True):
    """A worker is dead, noticed by `detector`, and the `tasks` that it had claimed are free."""

    dead: int
    detector: str
    tasks: int

    def to_line(self) -> bytes:
        """Return the news as a line."""
        return msgspec.json.encode({"news": self}) + b"\n"


class _Told(msgspec.Struct):
    news: News | None = None


def read_news(line: bytes) -> News | None:
    """Return what a supervisor tells in a line; None for what this release does not understand."""
    try:
        return msgspec.json.decode(line, type=_Told).news
    except msgspec.MsgspecError:
        return None


@dataclass(frozen=True, slots=True)
class Complaint:
    """One sentence that says why a child cannot start."""

    sentence: str


def beat_line(vitals: Vitals) -> bytes:
    """Return a beat as a line."""
    return msgspec.json.encode({"beat": vitals}) + b"\n"


def complaint_line(sentence: str) -> bytes:
    """Return a complaint as a line."""
    return msgspec.json.encode({"complaint": sentence[:COMPLAINT_MAX_CHARACTERS]}) + b"\n"


class _Message(msgspec.Struct):
    beat: Vitals | None = None
    complaint: str | None = None


def read_message(line: bytes) -> Vitals | Complaint | None:
    """Return what a child said in a line; None for what this release does not understand."""
    try:
        message = msgspec.json.decode(line, type=_Message)
    except msgspec.MsgspecError:
        return None
    return Complaint(message.complaint) if message.complaint is not None else message.beat


class ChildPipe:
    """The child's end. `send` is for one thread (the event loop's), `listen` for another."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._socket = end
        self._received = bytearray()
        self._unsent = b""

    @classmethod
    def inherited(cls, descriptor: int) -> ChildPipe:
        """Take the end over; processes that a step starts do not inherit it."""
        end = socket.socket(fileno=descriptor)
        end.set_inheritable(False)
        return cls(end)

    def receive(self) -> bytes | None:
        """Wait for the next line; None at the end of file: the supervisor is gone."""
        while b"\n" not in self._received:
            try:
                chunk = self._socket.recv(LINE_MAX_BYTES)
            except ConnectionError:
                chunk = b""
            if not chunk:
                return None
            self._received += chunk
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line + b"\n"

    def listen(self, on_line: Callable[[bytes], None], on_end: Callable[[], NoReturn]) -> None:
        """Call `on_line` with each further line, and `on_end` at the end of file."""
        while (line := self.receive()) is not None:
            on_line(line)
        on_end()

    def send(self, line: bytes) -> None:
        """Send a line without waiting; drop it while the supervisor does not read."""
        data = self._unsent + line
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            return  # the listening thread sees the end of file
        rest = len(self._unsent) - sent
        self._unsent = self._unsent[sent:] if rest > 0 else data[sent:]
