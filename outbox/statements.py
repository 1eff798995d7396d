"""Every statement of a client as a value: what to send, and how to read the answer.

Nothing here does I/O. `Client`, `AsyncClient` and whoever joins a caller's transaction carry the same statements
out, so that sync and async, psycopg and SQLAlchemy cannot come to differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

from outbox.codec import decode, encode
from outbox.errors import ConfigError, PayloadError, RunNotFound
from outbox.queries import load
from outbox.tracing import context_text

T = TypeVar("T")

Key = str | int | UUID
Duration = float | timedelta


class Identified(Protocol):
    """What has the id of a run: `Run`, `AsyncRun`, `RunInfo`."""

    @property
    def id(self) -> UUID:
        """The id of the run."""
        ...


RunLike = UUID | str | Identified
"""A run: by its id, as text too, or by what has it."""
Rows = Sequence[Sequence[Any]]

MAX_KEY_BYTES = 512
MAX_NAME_BYTES = 255
MAX_SECONDS = 1000 * 366 * 86400
LAST_YEAR = 9000
MAX_LABEL_LEVELS = 8
MAX_LABEL_NUMBER = 10**308


@dataclass(frozen=True, slots=True)
class Statement(Generic[T]):
    """One round trip: the SQL with ``%(name)s`` parameters, and what its rows mean.

    `repeatable` says that it may be sent again when the connection was lost before the answer came, although
    it may have been carried out.
    """

    sql: str
    parameters: Mapping[str, Any]
    decode: Callable[[Rows], T]
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is to be queued, checked: an error of the database would abort the caller's transaction."""

    queue: str | None
    priority: int
    delay: float | None
    at: datetime | None
    labels: str | None
    deadline: float | None
    lane: str | None
    tenant: str | None
    version: str | None = None
    trace: str | None = None

    @classmethod
    def of(
        cls,
        *,
        queue: str | None = None,
        priority: int = 5,
        delay: Duration | None = None,
        at: datetime | None = None,
        labels: Mapping[str, Any] | None = None,
        deadline: Duration | None = None,
        lane: str | None = None,
        tenant: str | None = None,
        version: str | None = None,
        trace: str | None = None,
    ) -> Options:
        """Return the options, or raise ConfigError (PayloadError for labels) that names the one at fault."""
        if type(priority) is not int or not 0 <= priority <= 9:
            raise ConfigError(f"priority must be a whole number from 0 (first) to 9 (last), got {priority!r}")
        if delay is not None and at is not None:
            raise ConfigError("give delay or at, not both")
        if at is not None and not _has_time_zone(at):
            raise ConfigError(f"at must be a datetime with a time zone, got {at!r}")
        if at is not None and not 1 < at.year < LAST_YEAR:
            raise ConfigError(f"at must be between the years 1 and {LAST_YEAR}, got {at!r}")
        if queue == "stepwell":
            raise ConfigError('the queue "stepwell" is for internal tasks; choose another name')
        return cls(
            queue=None if queue is None else name_text(queue, "the queue name"),
            priority=priority,
            delay=None if delay is None else seconds_of(delay, "delay"),
            at=at,
            labels=None if labels is None else _labels_text(labels),
            deadline=None if deadline is None else seconds_of(deadline, "deadline"),
            lane=None if lane is None else name_text(lane, "the lane"),
            tenant=None if tenant is None else name_text(tenant, "the tenant"),
            version=version if not version else name_text(version, "the version"),
            trace=None if trace is None else context_text(trace),
        )


def key_text(key: Key | None) -> str | None:
    """Return a key as the text that is stored. Raises PayloadError for anything that is no key."""
    if key is None:
        return None
    if not _is_key(key):
        raise PayloadError(f"a key must be a str, an int or a UUID, got `{type(key).__qualname__}`")
    if isinstance(key, int) and key.bit_length() > 4 * MAX_KEY_BYTES:  # Python would not even write it down
        raise PayloadError(f"a key has at most {MAX_KEY_BYTES} bytes, this number has more digits")
    text = str(key)
    if not text:
        raise PayloadError("a key must not be empty; pass None for a run without a key")
    _require_text(text, "the key", PayloadError)
    if len(text.encode()) > MAX_KEY_BYTES:
        raise PayloadError(f"a key has at most {MAX_KEY_BYTES} bytes, this one has {len(text.encode())}")
    return text


def name_text(name: str, what: str) -> str:
    """Return a name as it is, or raise ConfigError, beginning with `what`, if it cannot be one."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} must be a str, got `{type(name).__qualname__}`")
    _require_text(name, what, ConfigError)
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise ConfigError(f"{what} must have 1 to {MAX_NAME_BYTES} bytes")
    return name


def workflow_text(name: str) -> str:
    """Return the name of a workflow as it is, or raise ConfigError if none can be called so."""
    if "@" in name_text(name, "the workflow name") or name.startswith("step:"):
        raise ConfigError(f'the workflow name must have no @ and not begin with "step:", got {name!r}')
    return name


def sought_text(text: str | None, what: str) -> str | None:
    """Return a text that runs are found by, None if it is not given. Raises ConfigError if no run can have it."""
    if text is not None:
        _require_text(text, what, ConfigError)
    return text


def exchanged_name(name: object, function: str, error: type[ConfigError | ValueError] = ValueError) -> None:
    """Raise `error` unless a signal, a state or a stream can have this name."""
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise error(f"{function}() takes a printable name of 1 to {MAX_NAME_BYTES} bytes, got {name!r}")
    if name.startswith("stepwell:"):
        raise error(f'{function}(): names that begin with "stepwell:" are Stepwell\'s own, got {name!r}')


def run_uuid(run: RunLike) -> UUID:
    """Return the id of a run, given as a UUID, as its text or by what has it. Raises RunNotFound for anything else."""
    found: Any = run if isinstance(run, UUID | str) else getattr(run, "id", run)
    if isinstance(found, UUID):
        return found
    try:
        return UUID(found)
    except (ValueError, AttributeError, TypeError):
        raise RunNotFound(f"{run!r} is not the id of a run") from None


def seconds_of(duration: Duration, what: str) -> float:
    """Return a duration in seconds. Raises ConfigError, beginning with `what`, if it is none."""
    seconds: object = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ConfigError(f"{what} must be seconds or a timedelta, and not negative, got {duration!r}")
    if seconds > MAX_SECONDS:
        raise ConfigError(f"{what} is longer than a thousand years: {duration!r}")
    return float(seconds)


# -- producing ---------------------------------------------------------------------------------------


def enqueue(workflow: str, text: str, key: str | None, options: Options) -> Statement[tuple[UUID, bool]]:
    """Enqueue one run; answers (id, created)."""
    sql, parameters = _enqueuing(workflow, [text], [key], options)
    return Statement(sql, parameters, lambda rows: _created(rows[0]), repeatable=key is not None)


def enqueue_many(
    workflow: str, texts: list[str], keys: list[str | None], options: Options
) -> Statement[list[tuple[UUID, bool]]]:
    """Enqueue one run for each text; answers (id, created) for each, in their order."""
    sql, parameters = _enqueuing(workflow, texts, keys, options)
    return Statement(
        sql, parameters, lambda rows: [_created(row) for row in rows], repeatable=None not in keys
    )


def workflow_schema(workflow: str, version: str | None = None) -> Statement[dict[str, Any] | None]:
    """Read the JSON Schema of a workflow's input, None if no worker has published it. Without a version, the last one."""

    def read(rows: Rows) -> dict[str, Any] | None:
        return decode(rows[0][0], dict[str, Any], where=f"schema of {workflow}") if rows else None

    return Statement(load("workflow_schema"), {"workflow": workflow, "version": version}, read)


def cancel(run: UUID) -> Statement[bool]:
    """Ask for the end of a run; answers whether it was open. Asking twice does no harm."""
    return Statement(load("cancel"), {"run": run}, lambda rows: bool(rows[0][0]))


# -- parts -------------------------------------------------------------------------------------------


def _enqueuing(
    workflow: str, texts: list[str], keys: list[str | None], options: Options
) -> tuple[str, dict[str, Any]]:
    return load("enqueue_many"), {
        "workflow": workflow,
        "inputs": texts,
        "keys": None if all(key is None for key in keys) else keys,
        "queue": options.queue,
        "priority": options.priority,
        "delay": options.delay,
        "at": options.at,
        "lane": options.lane,
        "tenant": options.tenant,
        "labels": options.labels,
        "deadline": options.deadline,
        "version": options.version,
        "trace": options.trace,
    }


def _created(row: Sequence[Any]) -> tuple[UUID, bool]:
    return UUID(row[0]), row[1]


def _has_time_zone(value: object) -> bool:
    return isinstance(value, datetime) and value.utcoffset() is not None


def _is_key(value: object) -> bool:
    return isinstance(value, str | int | UUID) and not isinstance(value, bool)


def _labels_text(labels: Mapping[str, Any]) -> str:
    if not isinstance(labels, Mapping):
        raise PayloadError(f"labels must be a mapping, got `{type(labels).__qualname__}`")
    text = encode(dict(labels), where="labels")
    if not _is_plain(decode(text, where="labels"), MAX_LABEL_LEVELS):
        raise PayloadError(
            f"labels may be nested {MAX_LABEL_LEVELS} levels deep at most, without numbers above 1e308"
        )
    return text


def _is_plain(value: Any, levels: int) -> bool:
    """Tell whether a JSON value has so many levels at most, and no number that `jsonb` gives to nobody as a float."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return levels >= 0 and all(_is_plain(each, levels - 1) for each in inner)
    return levels >= 0 and (not isinstance(value, int | float) or abs(value) <= MAX_LABEL_NUMBER)


def _require_text(text: str, what: str, error: type[ConfigError | PayloadError]) -> None:
    if "\0" in text:
        raise error(f"{what} contains a NUL character, which Postgres cannot store")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise error(f"{what} contains a lone surrogate, which is half a character") from None
