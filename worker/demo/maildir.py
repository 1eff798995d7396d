"""A Maildir that a mail server fills, and the list of the connections that the server is serving.

Who touches it: the mail server's process writes (`prepare`, `store`, `opened`, `closed`); every other
process only reads. A message appears in ``new/`` by one rename after its bytes are on disk, so a reader
sees whole messages or nothing, and what the server has accepted outlives a power cut.

``open/`` holds one empty file for each connection, named by the name that the client gave in EHLO. The
server makes it *before* it answers EHLO, and no client sends a message before that answer; it removes
it when the connection is closed and nothing that came in over it can still be stored. So for a client
that has died: no file means that what is in the Maildir now is all there will ever be.

A server that was killed leaves its list behind. The next one clears it: its predecessor's connections
ended with it. Until then a reader waits and gives up with an error, which is right: it cannot know.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote

POLL_SECONDS = 0.01
NAME_MAX_CHARACTERS = 180


@dataclass(frozen=True, slots=True)
class Message:
    """What the headers of one stored message say. `execution` is 0 where its header is missing."""

    message_id: str
    recipient: str
    execution: int


class Maildir:
    """One Maildir on the local file system. Reading needs no lock; one process at a time may write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._serial = itertools.count(1)

    # -- the server's side -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the directories and drop what a killed server left: half-written files, old connections."""
        for name in ("tmp", "new", "cur", "open"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        for name in ("tmp", "open"):
            self._empty(name)

    def store(self, content: bytes, recipients: Sequence[str]) -> Path:
        """Put one message into ``new/``; when this returns, it is on disk. Safe from many threads."""
        envelope = "".join(f"Delivered-To: {recipient}\n" for recipient in recipients)
        message = envelope.encode(errors="surrogateescape") + content.replace(b"\r\n", b"\n")
        name = self._unique_name(_headers(message).get("Message-ID", ""))
        written = self.path / "tmp" / name
        with written.open("xb") as file:
            file.write(message)
            file.flush()
            os.fsync(file.fileno())
        stored = self.path / "new" / name
        written.rename(stored)
        _sync_directory(stored.parent)
        return stored

    def opened(self, client_name: str) -> Path:
        """List a connection of `client_name`; the path that is returned is what `closed` takes."""
        entry = self.path / "open" / f"{_file_name(client_name)}~{next(self._serial)}"
        entry.touch()
        return entry

    def closed(self, entry: Path) -> None:
        """Take a connection off the list: nothing of it can be stored any more."""
        entry.unlink(missing_ok=True)

    def close_all(self) -> None:
        """Take every connection off the list, as the last thing a server does."""
        self._empty("open")

    # -- everybody else's ------------------------------------------------------------------------------

    def connections(self) -> list[str]:
        """Return the names of the list's entries, one for each connection that is being served."""
        return [entry.name for entry in (self.path / "open").iterdir()]

    def is_being_served(self, client_name: str) -> bool:
        """Return whether the server holds a connection whose client called itself `client_name`."""
        start = f"{_file_name(client_name)}~"
        return any(name.startswith(start) for name in self.connections())

    def wait_until_closed(self, client_name: str, timeout_seconds: float) -> None:
        """Wait until no connection of `client_name` is being served; TimeoutError when one still is."""
        deadline = time.monotonic() + timeout_seconds
        while self.is_being_served(client_name):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the mail server has not closed the connection of {client_name}")
            time.sleep(POLL_SECONDS)

    def find(self, message_id: str) -> Path | None:
        """Return the stored message with this Message-ID, if there is one."""
        mark = f".{_digest(message_id)}."
        for path in self._files():
            if mark in path.name and _read(path).message_id == message_id:
                return path
        return None

    def messages(self) -> Iterator[Message]:
        """Yield every stored message."""
        return map(_read, self._files())

    def _files(self) -> Iterator[Path]:
        # new/ first: a mail reader may move a message on to cur/ in between, never back.
        for name in ("new", "cur"):
            yield from (self.path / name).iterdir()

    def _unique_name(self, message_id: str) -> str:
        """Return a name of the Maildir convention: time, a unique middle, host. No ``:`` and no ``/``."""
        host = _file_name(socket.gethostname())
        middle = f"{_digest(message_id)}.P{os.getpid()}Q{next(self._serial)}"
        return f"{time.time():.6f}.{middle}.{host}"

    def _empty(self, directory: str) -> None:
        for entry in (self.path / directory).iterdir():
            entry.unlink(missing_ok=True)


def _read(path: Path) -> Message:
    headers = _headers(path.read_bytes())
    execution = headers.get("X-Execution", "")
    return Message(
        message_id=headers.get("Message-ID", "").strip(),
        recipient=headers.get("Delivered-To", "").strip(),
        execution=int(execution) if execution.isdecimal() else 0,
    )


def _headers(message: bytes) -> dict[str, str]:
    """Return the headers, unfolded, the first of each name. As text: addresses may be UTF-8."""
    head, _, _ = message.replace(b"\r\n", b"\n").partition(b"\n\n")
    parsed = HeaderParser().parsestr(head.decode("utf-8", "replace"))
    return {name: value.replace("\n", "").strip() for name, value in reversed(parsed.items())}


def _digest(message_id: str) -> str:
    return hashlib.sha256(message_id.strip().encode()).hexdigest()[:20]


def _file_name(name: str) -> str:
    return quote(name, safe="")[:NAME_MAX_CHARACTERS]


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
