"""What goes into a run and comes out of it while it runs: signals, state, streams. Statements and values; no I/O here.

A stream is followed by looking again and again (`Following`): what a run emits is written with its history, in order and
in one snapshot with its end, so that the look which sees the end has seen everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from outbox.codec import encode
from outbox.errors import ConfigError, ResultTimeout, RunNotFound
from outbox.outcomes import pauses
from outbox.queries import load
from outbox.sealing import NO_KEYS, Keyring
from outbox.statements import Duration, Rows, Statement, exchanged_name, seconds_of

PROGRESS = "progress"
PAGE = 100
"""Items of a stream in one round trip; each may have a megabyte."""

_N_BITS = 32  # a position is the epoch, then the number within it


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: the last `progress(done, total)` of its body."""

    done: float
    total: float | None = None

    @property
    def fraction(self) -> float | None:
        """How much of it is done, from 0 to 1; None without a total."""
        return None if self.total is None else min(1.0, self.done / self.total) if self.total else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return {"done": self.done, "total": self.total}


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One value that a run has emitted. `position` is where to go on after it: ``stream(run, after=item.position)``."""

    position: int
    n: int
    """its number, counted from 1 over all names since the last rewind or fresh start of the run"""
    name: str
    value: Any
    at: datetime

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "at": self.at.isoformat()}


@dataclass(frozen=True, slots=True)
class Page:
    """What one look at a stream has found: the items of the wanted name, and how far it got."""

    items: tuple[StreamItem, ...]
    position: int
    full: bool
    """there may be more right now"""
    ended: bool
    """the run has ended, or is blocked: it emits nothing more"""


class Following:
    """A reader of a stream: which look comes next, and how long after the last.

    ``while not it.over: take(carry_out(it.statement())), then sleep it.pause()``.
    """

    def __init__(
        self,
        run: UUID,
        name: str | None,
        after: int,
        *,
        follow: bool,
        timeout: Duration | None,
        keyring: Keyring = NO_KEYS,
    ) -> None:
        if name is not None:
            exchanged_name(name, "stream", ConfigError)
        if type(after) is not int or not 0 <= after < 1 << (_N_BITS + 31):
            raise ConfigError(f"after= takes 0 or the position of an item, got {after!r}")
        if timeout is not None:
            seconds_of(timeout, "timeout")
        self.over = False
        self._run, self._name, self._position = run, name, after
        self._follow, self._timeout, self._keyring = follow, timeout, keyring
        self._pauses: Iterator[float] | None = None
        self._again = False

    def statement(self) -> Statement[Page]:
        """Return the next look."""
        return emitted(self._run, self._name, self._position, self._keyring)

    def take(self, page: Page) -> Sequence[StreamItem]:
        """Take note of what a look has found, and return its items."""
        self._position, self._again = page.position, page.full
        self.over = not page.full and (page.ended or not self._follow)
        if page.items:
            self._pauses = None
        return page.items

    def pause(self) -> float:
        """Return how long to wait before the next look. Raises ResultTimeout when nothing has come for too long."""
        if self.over or self._again:
            return 0.0
        self._pauses = self._pauses or pauses(self._timeout)
        try:
            return next(self._pauses)
        except StopIteration:
            raise ResultTimeout(
                f"run {self._run} has emitted nothing for {self._timeout} s and has not ended; it goes on, `why` may "
                "say what it waits for"
            ) from None


# -- statements --------------------------------------------------------------------------------------


def signal(
    run: UUID, name: str, payload: Any, max_bytes: int, keyring: Keyring = NO_KEYS, trace: str | None = None
) -> Statement[bool]:
    """Send a signal; answers whether the run was open. Raises ConfigError for the name, PayloadError."""
    exchanged_name(name, "signal", ConfigError)
    text = encode(payload, where=f"the payload of signal {name!r}", max_bytes=max_bytes)
    parameters = {
        "run": run, "name": name, "payload": keyring.seal(text, "signal", name), "trace": trace,
    }  # fmt: skip
    return Statement(load("signal"), parameters, lambda rows: bool(rows[0][0]), repeatable=False)


def state(run: UUID, keyring: Keyring = NO_KEYS) -> Statement[dict[str, Any]]:
    """Read what a run shows of itself. Raises RunNotFound."""
    return _state(run, None, keyring)


def progress(run: UUID, keyring: Keyring = NO_KEYS) -> Statement[Progress | None]:
    """Read how far a run is, None if it does not say. Raises RunNotFound."""
    every = _state(run, PROGRESS, keyring)
    return Statement(every.sql, every.parameters, lambda rows: progress_of(every.decode(rows).get(PROGRESS)))


def progress_of(value: Any) -> Progress | None:
    """Return the progress in a state's value, None if it holds none: set_state may have put anything there."""
    if not isinstance(value, dict) or not _is_figure(value.get("done")):
        return None
    total = value.get("total")
    return Progress(value["done"], total) if total is None or _is_figure(total) else None


def emitted(run: UUID, name: str | None, after: int, keyring: Keyring = NO_KEYS) -> Statement[Page]:
    """Read what a run has emitted after a position, and whether it has ended. Raises RunNotFound."""
    parameters = {
        "run": run, "name": name, "epoch": after >> _N_BITS, "n": after & ((1 << _N_BITS) - 1), "limit": PAGE,
    }  # fmt: skip

    def read(rows: Rows) -> Page:
        if not rows:
            raise _unknown(run)
        state, where = rows[0][0], f"what run {run} has emitted"
        found = [row[1:] for row in rows if row[1] is not None]
        items = tuple(
            StreamItem(epoch << _N_BITS | n, n, of, keyring.shown(text, "stream", of, where=where), at)
            for epoch, n, of, text, at in found
            if text is not None
        )
        reached = found[-1][0] << _N_BITS | found[-1][1] if found else after
        return Page(items, reached, full=len(found) == PAGE, ended=state != "open")

    return Statement(load("run_stream"), parameters, read)


def _state(run: UUID, key: str | None, keyring: Keyring) -> Statement[dict[str, Any]]:
    def read(rows: Rows) -> dict[str, Any]:
        if not rows:
            raise _unknown(run)
        return {
            key: keyring.shown(text, "state", key, where=f"the state {key!r} of run {run}")
            for key, text in rows
            if key is not None
        }

    return Statement(load("run_state"), {"run": run, "key": key}, read)


def _is_figure(value: object) -> bool:
    return type(value) in (int, float)


def _unknown(run: UUID) -> RunNotFound:
    return RunNotFound(f"there is no run {run}, or the transaction that enqueues it has not committed")
