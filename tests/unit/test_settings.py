from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from outbox.errors import ConfigError
from outbox.settings import Settings, without_password


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("STEPWELL_"):
            monkeypatch.delenv(name)


def test_defaults_need_no_environment() -> None:
    settings = Settings.load()
    assert settings.database_url is None
    assert settings.concurrency == 200
    assert settings.max_payload_bytes == 1_048_576
    assert settings.lease_seconds == 15.0


def test_arguments_go_before_the_environment_and_that_before_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEPWELL_THREADS", "7")
    monkeypatch.setenv("STEPWELL_CONNECTIONS", "3")
    settings = Settings.load(threads=9)
    assert (settings.threads, settings.connections, settings.poison_after) == (9, 3, 3)


def test_none_and_an_empty_variable_mean_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_THREADS", "")
    monkeypatch.setenv("STEPWELL_CONNECTIONS", "4")
    settings = Settings.load(threads=None, connections=None)
    assert (settings.threads, settings.connections) == (32, 4)


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "database_url": "postgresql://db/app",
        "direct_database_url": "postgresql://db2/app",
        "data_dir": "/srv/data",
        "tracing": "yes",
    }
    keys = {"encryption_keys", "encryption_keys_file"}  # exclude each other: tests/unit/test_sealing.py
    for each in fields(Settings):
        if each.name not in keys:
            monkeypatch.setenv(f"STEPWELL_{each.name.upper()}", given.get(each.name, "17"))
    settings = Settings.load()
    assert settings.database_url == "postgresql://db/app"
    assert settings.direct_database_url == "postgresql://db2/app"
    assert settings.data_dir == Path("/srv/data")
    assert settings.tracing is True
    for each in fields(Settings):
        if each.name not in given.keys() | keys:
            value = getattr(settings, each.name)
            assert value == 17
            assert type(value) is type(each.default)


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("STEPWELL_THREADS", "many", "STEPWELL_THREADS must be a whole number, got 'many'"),
        ("STEPWELL_THREADS", "1.5", "STEPWELL_THREADS must be a whole number, got '1.5'"),
        ("STEPWELL_THREADS", "0", "STEPWELL_THREADS: threads must be a positive number, got 0"),
        ("STEPWELL_LEASE_SECONDS", "soon", "STEPWELL_LEASE_SECONDS must be a number, got 'soon'"),
        ("STEPWELL_LEASE_SECONDS", "nan", "STEPWELL_LEASE_SECONDS: lease_seconds must be a positive number"),
        ("STEPWELL_LEASE_SECONDS", "-1", "STEPWELL_LEASE_SECONDS: lease_seconds must be a positive number"),
        ("STEPWELL_TRACING", "17", "STEPWELL_TRACING must be 1 or 0, got '17'"),
        ("STEPWELL_DATABASE_URL", "mysql://db", "STEPWELL_DATABASE_URL: database_url 'mysql://db'"),
    ],
)
def test_a_bad_value_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, says: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert str(caught.value).startswith(says)


def test_a_bad_argument_names_its_field() -> None:
    with pytest.raises(ConfigError, match="poison_after must be a positive number, got 0"):
        Settings(poison_after=0)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@db:5432/app",
        "postgres://db/app",
        "postgresql:///app?host=/run/pg",
        "host=db dbname=app",
    ],
)
def test_urls_and_conninfo_strings_are_accepted(url: str) -> None:
    assert Settings.load(database_url=url).database_url == url


def test_an_sqlalchemy_url_gets_advice() -> None:
    with pytest.raises(ConfigError, match="without the driver"):
        Settings(database_url="postgresql+psycopg://user:secret@db/app")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@db:5432/app",
        "postgresql://user:sec@secret@db/app",
        "postgresql://db/app?user=u&password=secret&sslmode=require",
        "host=db password=secret dbname=app",
        r"host=db password = 'secret \' secret' dbname=app",
        "mysql://user:secret@db/app",
    ],
)
def test_no_password_is_ever_shown(url: str) -> None:
    assert "secret" not in without_password(url)
    assert "***" in without_password(url)
    assert "app" in without_password(url)
    for name in ("database_url", "direct_database_url"):
        try:
            shown = repr(Settings(**{name: url}))
        except ConfigError as error:
            shown = str(error)
        assert "secret" not in shown


def test_a_second_way_to_the_database_needs_a_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_DIRECT_DATABASE_URL", "postgresql://db/app")
    with pytest.raises(ConfigError, match="without STEPWELL_DATABASE_URL"):
        Settings.load()
    monkeypatch.setenv("STEPWELL_DATABASE_URL", "postgresql://pooler/app")
    assert Settings.load().direct_database_url == "postgresql://db/app"


def test_the_second_way_of_the_environment_is_not_taken_to_another_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", "postgresql://pooler/app")
    monkeypatch.setenv("STEPWELL_DIRECT_DATABASE_URL", "postgresql://db/app")
    settings = Settings.load(database_url="postgresql://elsewhere/app")
    assert (settings.database_url, settings.direct_database_url) == ("postgresql://elsewhere/app", None)


def test_a_bad_second_way_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_DIRECT_DATABASE_URL", "mysql://user:secret@db")
    with pytest.raises(ConfigError, match=r"^STEPWELL_DIRECT_DATABASE_URL: direct_database_url") as caught:
        Settings.load()
    assert "secret" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().threads = 3  # type: ignore[misc]


def test_root_gets_a_data_directory_that_the_embedding_library_may_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    first = Settings.load().data_dir
    assert first.parent == Path("/var/tmp")
    assert Settings.load().data_dir == first
    monkeypatch.chdir("/")
    assert Settings.load().data_dir != first


def test_anybody_else_keeps_data_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Settings.load().data_dir == Path(".stepwell")


def test_a_misspelt_variable_is_told_of_and_any_other_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STEPWELL_CONCURENCY", "7")
    monkeypatch.setenv("STEPWELL_OF_OURS", "7")
    assert Settings.load().concurrency == Settings().concurrency
    (said,) = (record.getMessage() for record in caplog.records)
    assert (
        said == "STEPWELL_CONCURENCY is not a setting and changes nothing; did you mean STEPWELL_CONCURRENCY?"
    )


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(TypeError, match="thraeds"):
        Settings.load(thraeds=3)
