"""One frozen `Settings`: from arguments, then ``STEPWELL_*`` in the environment, then defaults."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable
from configparser import ConfigParser
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from outbox.errors import ConfigError
from outbox.sealing import NO_KEYS, Keyring

logger = logging.getLogger(__name__)

_PREFIX = "STEPWELL_"
_URLS = frozenset({"database_url", "direct_database_url"})
_KEYS = frozenset({"encryption_keys", "encryption_keys_file"})
# password, sslpassword, oauth_client_secret, scram_client_key, scram_server_key
_SECRET_OPTIONS = re.compile(
    r"(\b\w*(?:password|_secret|_key)\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", re.IGNORECASE
)


def _default_data_dir() -> Path:
    """Return where the embedded Postgres keeps its data.

    As root that is a directory of its own per working directory under /var/tmp: the embedding library opens
    every parent of its data directory for reading, which must not happen to root's home.
    """
    if os.geteuid() != 0:
        return Path(".stepwell")
    digest = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:8]
    return Path("/var/tmp") / f"stepwell-root-{digest}"  # noqa: S108 - named per directory; its owner is checked


@dataclass(frozen=True, repr=False, kw_only=True)
class Settings:
    """What can be set, with its default. Durations are seconds, sizes bytes."""

    database_url: str | None = None
    """Where Postgres is; None means the embedded one in `data_dir`."""
    direct_database_url: str | None = None
    """The same database by an address without a connection pooler, where `database_url` leads through one: for what needs
    a session of its own (a supervisor's locks, being rung for, the exporter's lock, migrations)."""
    data_dir: Path = field(default_factory=_default_data_dir)
    """Where the embedded Postgres lives."""
    max_payload_bytes: int = 1_048_576
    """The largest input, signal or result, as JSON text. A worker does not read larger ones, which SQL takes."""
    concurrency: int = 200
    """Runs in flight per worker process."""
    threads: int = 32
    """Threads per worker process for steps that are not async."""
    connections: int = 8
    """Connections per worker process for transactional steps."""
    poll_seconds: float = 1.0
    """How long an idle worker waits for a ring before it looks by itself."""
    doorbell_seconds: float = 5.0
    """How long the lease of an idle worker asks producers to ring; longer than a poll, so that it never lapses."""
    beat_seconds: float = 1.0
    """How often a supervisor beats for its workers."""
    lost_lock_seconds: float = 3.0
    """A beat unchanged and a lock absent for so long: the worker is dead."""
    lease_seconds: float = 15.0
    """A beat unchanged for so long: the worker is dead."""
    stopped_after_seconds: float = 5.0
    """A child in state T (stopped) for so long is killed."""
    hang_after_seconds: float = 120.0
    """A child that shows no progress for so long is killed. One that is still loading has five minutes at least."""
    grace_seconds: float = 30.0
    """How long a draining worker lets executions end."""
    poison_after: int = 3
    """A task interrupted alone so many times is blocked."""
    flush_max_rows: int = 500
    """Transitions in one flush at most."""
    flush_max_bytes: int = 4_194_304
    """Payload bytes in one flush at most."""
    encryption_keys: str | None = None
    """Keys for payloads, as ``id:base64`` with commas between them: the first one seals, all open."""
    encryption_keys_file: Path | None = None
    """A file that holds them instead, one on each line."""
    tracing: bool | None = None
    """Whether workers trace runs with OpenTelemetry. None: if APP has set it up, or the environment names where to send."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            number = isinstance(value, int | float) and each.name != "tracing"
            if number and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{each.name} must be a positive number, got {value!r}")
        for name in _URLS:
            if (url := getattr(self, name)) is not None:
                _check_url(name, url)
        if self.encryption_keys is not None:
            Keyring.of(self.encryption_keys)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return settings from `overrides`, else the environment, else defaults.

        None and an empty variable both mean "not given". Raises ConfigError, naming the variable, for a value
        that cannot be understood.
        """
        _warn_of_misspelt_variables(tuple(each.name for each in fields(cls)))
        given = {name: value for name, value in overrides.items() if value is not None}
        # What belongs together comes from one place: other keys, or another database, may be meant.
        decided = {name for together in (_KEYS, _URLS) if not together.isdisjoint(given) for name in together}
        for each in fields(cls):
            text = os.environ.get(_PREFIX + each.name.upper(), "").strip()
            if text and each.name not in given.keys() | decided:
                given[each.name] = _from_environment(each.name, text)
        if "direct_database_url" in given and "database_url" not in given:
            raise ConfigError(
                "STEPWELL_DIRECT_DATABASE_URL is set without STEPWELL_DATABASE_URL: it is a second way to the same "
                "database; where there is one way only, set STEPWELL_DATABASE_URL to it"
            )
        for name in ("data_dir", "encryption_keys_file"):
            if name in given:
                given[name] = Path(given[name]).expanduser()
        made = cls(**given)
        made.keyring()  # a worker that cannot read its keys does not start
        return made

    def keyring(self) -> Keyring:
        """Return the keys for payloads, an empty ring if there are none. Raises ConfigError, which shows no key."""
        if self.encryption_keys_file is None:
            return NO_KEYS if self.encryption_keys is None else Keyring.of(self.encryption_keys)
        if self.encryption_keys is not None:
            raise ConfigError("give encryption_keys or encryption_keys_file, not both")
        try:
            text = self.encryption_keys_file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigError(
                f"encryption_keys_file {str(self.encryption_keys_file)!r} cannot be read: {said}"
            ) from None
        try:
            return Keyring.of(text)
        except ConfigError as error:
            raise ConfigError(f"encryption_keys_file {str(self.encryption_keys_file)!r}: {error}") from None

    def __repr__(self) -> str:
        shown = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in _URLS:
            if (url := getattr(self, name)) is not None:
                shown[name] = without_password(url)
        if self.encryption_keys is not None:
            shown["encryption_keys"] = Keyring.of(self.encryption_keys)
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def without_password(url: str) -> str:
    """Return `url` (a URL or a conninfo string, or what was meant as one) with every secret replaced by ``***``."""
    hidden = re.sub(r":(?!//).*@", ":***@", url, flags=re.DOTALL)
    return _SECRET_OPTIONS.sub(r"\1***", hidden)


def _check_url(name: str, url: str) -> None:
    if re.match(r"postgres(ql)?://", url) or (re.match(r"\s*\w+\s*=", url) and "://" not in url):
        return
    shown = without_password(url)
    advice = (
        "write it without the driver, as postgresql://…"
        if url.startswith(("postgresql+", "postgres+"))
        else "write postgresql://user:password@host:5432/database, or host=… dbname=…"
    )
    raise ConfigError(f"{name} {shown!r} is not the address of a Postgres database; {advice}")


def _warn_of_misspelt_variables(names: tuple[str, ...]) -> None:
    known = [_PREFIX + name.upper() for name in names]
    for variable in os.environ:
        if variable.startswith(_PREFIX) and variable not in known:
            meant = difflib.get_close_matches(variable, known, n=1, cutoff=0.9)
            if meant:
                logger.warning(
                    "%s is not a setting and changes nothing; did you mean %s?", variable, meant[0]
                )


def _from_environment(name: str, text: str) -> Any:
    """Return the value of one field from its variable's text."""
    variable = _PREFIX + name.upper()
    kind = _READERS.get(type(Settings.__dataclass_fields__[name].default), str)
    if name == "tracing":  # has three values, and so no type of its default to go by
        kind = _truth
    try:
        value: Any = kind(text)
        Settings(**{name: value})
    except ValueError:
        wanted = "1 or 0" if kind is _truth else "a whole number" if kind is int else "a number"
        raise ConfigError(f"{variable} must be {wanted}, got {text!r}") from None
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
    return value


def _truth(text: str) -> bool:
    try:
        return ConfigParser.BOOLEAN_STATES[text.lower()]
    except KeyError:
        raise ValueError(text) from None


_READERS: dict[type, Callable[[str], Any]] = {int: int, float: float}
