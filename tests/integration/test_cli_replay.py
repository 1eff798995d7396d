"""`stepwell runs export` and `stepwell replay`: histories of real runs against code that has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.waiting import wait_until

Db = psycopg.Connection[Any]

APP = """
from worker import sleep, step, workflow

@step
async def greet(name: str) -> str:
    return f"hello {name}"

@step
async def save(text: str) -> int:
    return len(text)

@workflow
async def welcome(name: str) -> int:
    text = await greet(name)
    size = await save(text)
    if name == "slow":
        await sleep(3600)
    return size

@workflow
async def other() -> None: ...
"""
SWAPPED = APP.replace(
    "    text = await greet(name)\n    size = await save(text)\n",
    "    size = await save(name)\n    text = await greet(name)\n",
)
LONGER = APP.replace("    return size\n", "    await save(text)\n    return size\n")
DRIFTING = APP.replace("await greet(name)", 'await greet(name + "!")')
WITHOUT = APP.replace("async def welcome", "async def farewell")


class Shop:
    """A directory with versions of one APP, and the database that their commands use."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url

    def environment(self) -> dict[str, str]:
        return {**os.environ, "STEPWELL_DATABASE_URL": self.url, "TMPDIR": str(self.directory)}

    def app(self, text: str) -> str:
        path = self.directory / f"flows_{abs(hash(text))}.py"
        path.write_text(text)
        return str(path)

    def stepwell(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "stepwell", *arguments]
        done = subprocess.run(
            command, cwd=self.directory, env=self.environment(), capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
        return done

    def ids(self, *arguments: str) -> set[str]:
        return {
            json.loads(line)["id"] for line in self.stepwell("runs", "export", *arguments).stdout.splitlines()
        }


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Shop:
    return Shop(tmp_path, database_url)


@pytest.fixture
def runs(shop: Shop, db: Db) -> tuple[str, str]:
    """One run that has ended, and one that sleeps."""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "stepwell", "worker", shop.app(APP), "--processes", "1"],
        cwd=shop.directory, env=shop.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found = [
            str(
                db.execute("select stepwell.enqueue('welcome', %s)", [json.dumps({"name": name})]).fetchone()[
                    0
                ]
            )  # type: ignore[index]
            for name in ("Ann", "slow")
        ]
        states = "select (select state from stepwell.runs where id = %s), (select state from stepwell.tasks where run_id = %s)"
        wait_until(lambda: db.execute(states, found).fetchone() == ("succeeded", "waiting"), 60)
    finally:
        worker.kill()
        worker.wait()
    return found[0], found[1]


def test_histories_are_rehearsed_against_the_code(shop: Shop, runs: tuple[str, str]) -> None:
    ended, asleep = runs
    same = shop.stepwell("replay", shop.app(APP))
    assert (same.returncode, same.stdout) == (0, "1 replayed, 0 would be blocked\n")
    assert (
        shop.stepwell("replay", shop.app(LONGER), "--since", "1h").stdout
        == "2 replayed, 0 would be blocked\n"
    )

    swapped = shop.stepwell("replay", shop.app(SWAPPED))
    assert swapped.returncode == 1
    assert swapped.stdout.splitlines()[0] == f"run {asleep} of welcome (open): history mismatch"
    assert "  recorded: step greet at 1 (completed)\n  the code: step save at 1\n" in swapped.stdout
    assert swapped.stdout.endswith("1 replayed, 1 would be blocked\n")

    found = shop.stepwell("replay", shop.app(SWAPPED), "--since", "1h", "--json")
    assert found.returncode == 1
    told = json.loads(found.stdout)
    assert told["replayed"] == 2
    assert {each["run"] for each in told["mismatches"]} == {ended, asleep}
    assert {each["expected"] for each in told["mismatches"]} == {"step greet at 1 (completed)"}


def test_other_arguments_are_told_and_fail_unless_they_are_allowed(shop: Shop, runs: tuple[str, str]) -> None:
    _, asleep = runs
    drifting = shop.stepwell("replay", shop.app(DRIFTING))
    assert drifting.returncode == 1
    first, message, recorded, got, arguments, summary = drifting.stdout.splitlines()
    assert first == f"run {asleep} of welcome (open): would drift"
    assert "other arguments" in message
    assert f"{shop.app(DRIFTING)}:14: " in message
    assert recorded.startswith("  recorded: step greet at 1, arguments #")
    assert got.startswith("  the code: step greet at 1, arguments #")
    assert arguments == '      with: {"name":"slow!"}'
    assert summary == "1 replayed, 0 would be blocked, 1 would drift"

    told = json.loads(shop.stepwell("replay", shop.app(DRIFTING), "--json").stdout)
    assert (told["mismatches"], [each["run"] for each in told["drifts"]]) == ([], [asleep])

    allowed = shop.stepwell("replay", shop.app(DRIFTING), "--allow-drift")
    assert (allowed.returncode, allowed.stdout) == (
        0, "1 replayed, 0 would be blocked, 1 would drift (allowed)\n",
    )  # fmt: skip
    assert shop.stepwell("replay", shop.app(SWAPPED), "--allow-drift").returncode == 1


def test_runs_that_nobody_would_take_any_more_fail_unless_others_have_their_code(
    shop: Shop, runs: tuple[str, str]
) -> None:
    gone = shop.stepwell("replay", shop.app(WITHOUT))
    assert (gone.returncode, gone.stdout) == (
        1, "0 replayed, 0 would be blocked, 1 would have no code\n",
    )  # fmt: skip
    assert "welcome (1); --allow-missing" in gone.stderr
    told = json.loads(shop.stepwell("replay", shop.app(WITHOUT), "--since", "1h", "--json").stdout)
    assert (told["without_code"], told["left_out"]) == ({"welcome": 1}, {"welcome": 1})

    allowed = shop.stepwell("replay", shop.app(WITHOUT), "--allow-missing")
    assert (allowed.returncode, allowed.stdout) == (
        0, "0 replayed, 0 would be blocked, 1 would have no code (allowed)\n",
    )  # fmt: skip
    narrowed = shop.stepwell("replay", shop.app(WITHOUT), "--workflow", "farewell")
    assert (narrowed.returncode, narrowed.stdout) == (0, "0 replayed, 0 would be blocked\n")


def test_a_blocked_run_is_rehearsed_with_those_that_are_open(
    shop: Shop, runs: tuple[str, str], db: Db
) -> None:
    ended, asleep = runs
    db.execute("update stepwell.outbox set outcome = 'blocked' where run_id = %s and kind = 'run'", [ended])
    db.execute("update stepwell.runs set state = 'blocked' where id = %s", [ended])
    assert shop.ids() == {ended, asleep}
    assert shop.stepwell("replay", shop.app(APP), "--open").stdout == "2 replayed, 0 would be blocked\n"


def test_an_export_is_rehearsed_without_a_database(shop: Shop, runs: tuple[str, str]) -> None:
    ended, asleep = runs
    file = shop.directory / "histories.jsonl"
    done = shop.stepwell("runs", "export", "--since", "1h", "--output", str(file))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"2 runs exported to {file}\n"
    assert not list(shop.directory.glob("*.part"))

    assert shop.ids(ended[:23]) == {ended}
    assert shop.ids("--open") == {asleep} == shop.ids("--workflow", "welcome")
    assert shop.ids("--since", "1h") == {ended, asleep}
    assert shop.ids("--since", "1h", "--workflow", "other") == set()

    shop.url = "postgresql://nobody@127.0.0.1:1/nothing"
    assert shop.stepwell("replay", shop.app(APP), "--file", str(file)).returncode == 0
    swapped = shop.stepwell("replay", shop.app(SWAPPED), "--file", str(file), "--workflow", "welcome")
    assert (swapped.returncode, swapped.stdout.splitlines()[-1]) == (1, "2 replayed, 2 would be blocked")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "export", "0123", "--open"], "one of them says which runs are meant"),
        (["runs", "export", "--open", "--since", "1h"], "one of them says which runs are meant"),
        (["runs", "export", "0123", "--workflow", "w"], "leave it out where the runs are given"),
        (["runs", "export", "--output", "none/such/file"], "cannot be written"),
        (["replay", "APP", "--open", "--since", "1h"], "exclude each other"),
        (["replay", "APP", "--file", "bad.jsonl", "--open"], "brings its own runs"),
        (["replay", "APP", "--file", "bad.jsonl"], "bad.jsonl, line 2: this is no exported run"),
        (["replay", "missing.py"], "there is no file missing.py"),
        (["replay", "APP", "--file", "missing.jsonl"], "does not exist"),
    ],
)
def test_mistakes_are_told_in_a_sentence(shop: Shop, arguments: list[str], said: str) -> None:
    (shop.directory / "bad.jsonl").write_text("\n{}\n")
    app = shop.app(APP)
    done = shop.stepwell(*(app if each == "APP" else each for each in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
