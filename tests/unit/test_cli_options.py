"""How the text of options is read, and what errors come to."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import click
import psycopg
import pytest
from click.testing import CliRunner

from outbox.errors import (
    ConfigError,
    PayloadError,
    ResultTimeout,
    RunBlocked,
    RunConflict,
    RunFailed,
    RunNotFound,
)
from worker.cli import main
from worker.cli.mistakes import Failed, Mistake, told
from worker.cli.options import duration, labels, moment

ANY: Any = None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5h", 5400), ("250ms", 0.25), (" 2 d ", 172_800), (".5m", 30), ("0", 0)],
)
def test_durations_are_seconds_or_have_a_unit(text: str, seconds: float) -> None:
    assert duration(ANY, ANY, text) == seconds


def test_the_option_that_ps_shows_says_so() -> None:
    said = " ".join(CliRunner().invoke(main, ["runs", "list", "--help"]).output.split())
    assert "`ps` shows options to everybody: give an address with a password by STEPWELL_DATABASE_URL" in said


@pytest.mark.parametrize("text", ["", "soon", "-1", "1w", "1h30m", "inf", "nan", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no duration"):
        duration(ANY, ANY, text)


def test_times_have_an_offset_or_are_local() -> None:
    assert moment(ANY, ANY, "2026-11-22T12:00:00Z") == datetime(2026, 11, 22, 12, tzinfo=UTC)
    local = moment(ANY, ANY, "2026-11-22T12:00")
    assert local is not None
    assert local.replace(tzinfo=None) == datetime(2026, 11, 22, 12)
    assert isinstance(local.utcoffset(), timedelta)
    with pytest.raises(click.BadParameter, match="is no time"):
        moment(ANY, ANY, "tomorrow")


def test_labels_are_name_and_value() -> None:
    assert labels(ANY, ANY, ("a=b", "c=d=e", "f=")) == {"a": "b", "c": "d=e", "f": ""}
    with pytest.raises(click.BadParameter, match="is no label"):
        labels(ANY, ANY, ("a",))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (PayloadError("x"), 2),
        (RunNotFound("x"), 2),
        (Mistake("x"), 2),
        (Failed("x"), 1),
        (RunConflict("x"), 1),
        (RunFailed(uuid4()), 1),
        (RunBlocked(uuid4()), 1),
        (ResultTimeout("x"), 1),
        (psycopg.OperationalError("connection refused\nIs the server running?"), 1),
    ],
)
def test_known_errors_are_one_sentence_and_a_status(error: Exception, status: int) -> None:
    known = told(error)
    assert known is not None
    assert known.status == status
    assert "\n" not in known.sentence


def test_a_bug_keeps_its_traceback() -> None:
    assert told(KeyError("x")) is None


@pytest.mark.parametrize(
    "command", [[], ["migrate"], ["worker"], ["enqueue"], ["runs"], ["runs", "list"], ["demo"]]
)
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_help_and_version_import_no_engine() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom worker.cli import main\n"
        "for option in ('--help', '--version'):\n    assert CliRunner().invoke(main, [option]).exit_code == 0\n"
        "print([name for name in ('worker.engine.engine', 'worker.supervision.supervisor', 'prometheus_client') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_command_is_a_mistake() -> None:
    assert CliRunner().invoke(main, ["frobnicate"]).exit_code == 2


def test_a_command_whose_extra_is_missing_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "worker.cli.demo", None)
    result = CliRunner().invoke(main, ["demo", "--leads", "5"])
    assert result.exit_code == 2
    assert 'pip install "stepwell[demo]"' in result.output
    assert result.output.count("\n") == 1
