"""Sealed payloads on the command line, and with the processes as they really run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.rows import TupleRow

from outbox import Client, Settings
from tests.scanning import places_of
from tests.waiting import wait_until
from worker.cli import main

Db = psycopg.Connection[TupleRow]
Command = Callable[..., Result]

SECRET = "xylophone"

FLOWS = """
from worker import emit, set_state, step, wait_signal, workflow

@step
async def greet(name: str) -> str:
    if name == "bad":
        raise ValueError(f"no xylophone for {name}")
    return f"hello {name}"

@workflow
async def welcome(name: str) -> str:
    set_state("name", name)
    emit("log", name)
    greeting = await greet(name)
    await wait_signal("go")
    return greeting
"""


@pytest.fixture
def stepwell(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `stepwell …` in this process, in a directory with flows.py and a file of keys."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", database_url)
    (tmp_path / "flows.py").write_text(FLOWS)

    def run(*arguments: str, env: dict[str, str] | None = None, input: str | None = None) -> Result:
        result = CliRunner().invoke(main, arguments, input=input, env=env, catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    made = run("encryption", "key", "--id", "mine")
    assert made.exit_code == 0
    (tmp_path / "keys").write_text(made.stdout)
    monkeypatch.setenv("STEPWELL_ENCRYPTION_KEYS_FILE", str(tmp_path / "keys"))
    return run


@contextmanager
def working(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run `stepwell worker` as it is run; yield it, and the file that it logs to."""
    log = Path("worker.log").absolute()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stepwell", "worker", "flows.py", "--log-level", "debug", *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def group_of(leader: int) -> Iterator[Path]:
    """Yield where the kernel tells of each process of a session."""
    for each in Path("/proc").iterdir():
        with suppress(OSError, ProcessLookupError):
            if each.name.isdigit() and os.getsid(int(each.name)) == leader:
                yield each


def without_keys() -> dict[str, str]:
    return {"STEPWELL_ENCRYPTION_KEYS_FILE": ""}


def test_a_key_is_made_as_the_settings_take_it(stepwell: Command) -> None:
    made = stepwell("encryption", "key")
    assert Settings(encryption_keys=made.stdout).keyring()
    assert stepwell("encryption", "key").stdout != made.stdout
    refused = stepwell("encryption", "key", "--id", "no id")
    assert refused.exit_code == 2
    assert refused.stdout == ""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_worker_shows_no_key_and_no_payload_to_ps_logs_or_the_database(
    stepwell: Command, db: Db, tmp_path: Path
) -> None:
    key = (tmp_path / "keys").read_text().strip().partition(":")[2]
    run = stepwell("enqueue", "welcome", json.dumps({"name": SECRET}), "--allow-unknown").stdout.strip()
    bad = stepwell("enqueue", "welcome", json.dumps({"name": "bad"}), "--allow-unknown").stdout.strip()
    with working("--processes", "2") as (process, log), Client() as client:
        wait_until(lambda: client.get(bad).status == "failed", 60, what="the failing run to end")
        wait_until(lambda: client.state(run) == {"name": SECRET}, 60, what="the run to show its state")
        group = list(group_of(process.pid))
        assert len(group) >= 3
        for each in group:
            assert key not in (each / "cmdline").read_text()
            assert key not in (each / "environ").read_text(), "it is in a file"
            assert "mine" not in (each / "cmdline").read_text()
        stepwell("signal", run, "go")
        assert client.result(run, timeout=20) == f"hello {SECRET}"
    logged = log.read_text()
    assert "claiming" in logged
    assert "has failed" in logged
    assert SECRET not in logged
    assert key[:12] not in logged
    assert places_of(db, SECRET) == {}
    assert places_of(db, key[:12]) == {}


def test_what_is_shown_is_opened_with_the_key_and_told_of_without(
    stepwell: Command, database_url: str, tmp_path: Path
) -> None:
    run = stepwell("enqueue", "welcome", json.dumps({"name": SECRET}), "--allow-unknown").stdout.strip()
    with working(), Client() as client:
        wait_until(lambda: client.state(run) == {"name": SECRET}, 60, what="the run to show its state")
        stepwell("signal", run, "go", json.dumps({"by": SECRET}))
        client.result(run, timeout=20)
    for arguments in (
        ("runs", "show", run),
        ("runs", "show", run, "--json"),
        ("runs", "state", run),
        ("runs", "stream", run),
        ("runs", "list", "--json"),
    ):
        opened = stepwell(*arguments)
        assert opened.exit_code == 0
        assert SECRET in opened.stdout, arguments
        blind = stepwell(*arguments, env=without_keys())
        assert blind.exit_code == 0
        assert SECRET not in blind.stdout + blind.stderr, arguments
        assert "sealed with key mine" in blind.stdout, arguments

    blind = stepwell("runs", "export", run, "--output", "runs.jsonl")
    assert blind.exit_code == 0
    assert SECRET not in (tmp_path / "runs.jsonl").read_text(), "an export stays sealed"
    replayed = stepwell("replay", "flows.py", "--file", "runs.jsonl")
    assert replayed.exit_code == 0, replayed.output
    assert stepwell("replay", "flows.py", "--since", "1h").exit_code == 0
    refused = stepwell("replay", "flows.py", "--file", "runs.jsonl", env=without_keys())
    assert refused.exit_code == 1
    assert "sealed with key 'mine', and no key is given here" in refused.stdout


def test_it_is_told_which_keys_are_in_use(stepwell: Command, tmp_path: Path) -> None:
    empty = stepwell("encryption", "status", "--json")
    assert json.loads(empty.stdout) == {"keys": [{"key": "mine", "here": True, "seals": True, "values": {}}]}
    run = stepwell("enqueue", "welcome", '{"name": "x"}', "--allow-unknown").stdout.strip()
    stepwell("signal", run, "go", '{"stepwell": "sealed"}')
    newer = stepwell("encryption", "key", "--id", "newer").stdout
    file = tmp_path / "keys"
    file.write_text(f"{newer}{file.read_text()}")
    stepwell("signal", run, "go")
    told = json.loads(stepwell("encryption", "status", "--json").stdout)["keys"]
    assert told == [
        {"key": "newer", "here": True, "seals": True, "values": {"signals": 1}},
        {"key": "mine", "here": True, "seals": False, "values": {"runs": 1, "signals": 1}},
    ]
    file.write_text(newer)
    drawn = stepwell("encryption", "status").stdout
    assert "not given here; runs 1, signals 1" in drawn
    assert "seals new values; signals 1" in drawn
    nothing = stepwell("encryption", "status", env=without_keys())
    assert nothing.stdout.count("not given here") == 2


def test_a_mistake_in_the_keys_is_one_sentence_without_the_key(stepwell: Command, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("mine:bm90IGxvbmcgZW5vdWdo\n")
    refused = stepwell("runs", "list")
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "encryption key 'mine' has 15 bytes, and not 32" in refused.stderr
    assert "bm90" not in refused.stderr
