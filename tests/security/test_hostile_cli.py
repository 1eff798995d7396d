"""What may be typed, piped or read from files: it is taken or told in one sentence, and nothing drives the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from outbox.database import connect
from tests.claimant import Claimant
from tests.postgres import Cluster
from tests.security.hostile import JSON_TEXTS, TEXTS, bounded, drives_a_terminal, json_texts, texts
from tests.security.members import Db
from worker.cli import main

ROOT = Path(__file__).resolve().parents[2]
TERMINAL = "\x1b[2J\x1b]0;mine\x07\x9b31m\u202e\x7f\r\x08"
"""Clears the screen, renames the window, turns red, runs from right to left, goes back."""

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[str]:
    with cluster.database() as url, connect(url, application_name="test") as db:
        schema = {"type": "object", "properties": {"a": {}, "n": {"type": "integer"}}}
        db.execute("insert into stepwell.workflows values ('w', '', %s)", [json.dumps(schema)])
        yield url


@pytest.fixture
def shared_db(shared: str) -> Iterator[Db]:
    with connect(shared, application_name="test") as connection:
        yield connection


@pytest.fixture
def stepwell(shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process; see that it ends well or with one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", shared)

    def run(*arguments: str, input: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(main, list(arguments), input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            arguments, repr(result.exception)[:300],
        )  # fmt: skip
        assert result.exit_code in (0, 1, 2), arguments
        assert drives_a_terminal(result.output) == "", (arguments, result.output[:300])
        if result.exit_code and not result.stdout and not result.stderr.startswith("Usage:"):
            assert result.stderr.startswith("stepwell: "), (arguments, result.stderr[:300])
            assert result.stderr.count("\n") == 1, (arguments, result.stderr[:300])
        return result

    return run


def counted(db: Db) -> tuple[Any, ...] | None:
    return db.execute(
        "select (select count(*) from stepwell.runs), (select count(*) from stepwell.signals)"
    ).fetchone()


arguments = (
    (texts | st.sampled_from(["\udcff", "a\udc80b"]))
    .map(lambda t: t.replace("\0", ""))
    .filter(lambda t: all(not 0xD800 <= ord(c) < 0xDC80 and not 0xDCFF < ord(c) <= 0xDFFF for c in t))
)
"""With surrogates as Python makes them of bytes that are no UTF-8."""


@bounded(25)
@given(text=json_texts)
def test_any_json_is_enqueued_to_the_letter_of_its_value_or_refused(
    stepwell: Run, shared_db: Db, text: str
) -> None:
    before = counted(shared_db)
    result = stepwell("enqueue", "w", "-", "--allow-unknown", input=f'{{"a":{text}}}'.encode())
    if result.exit_code:
        assert result.exit_code == 2
        assert counted(shared_db) == before
        return
    found = shared_db.execute("select input::text from stepwell.runs where id = %s", [result.output.strip()])
    row = found.fetchone()
    assert row is not None
    assert repr(json.loads(row[0])) == repr({"a": json.loads(text)})


@bounded(30)
@given(
    name=arguments,
    options=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("--key", "--queue", "--label", "--version", "--delay", "--at"), arguments)
    ),
)  # fmt: skip
def test_any_name_and_option_is_enqueued_or_refused(
    stepwell: Run, shared_db: Db, name: str, options: dict[str, str]
) -> None:
    before = counted(shared_db)
    given_options = [f"{option}={value}" for option, value in options.items()]
    result = stepwell("enqueue", *given_options, "--allow-unknown", "--", name, "{}")
    if result.exit_code:
        assert result.exit_code == 2
        assert counted(shared_db) == before
    else:
        row = shared_db.execute(
            "select workflow, key from stepwell.runs where id = %s", [result.stdout.strip()]
        ).fetchone()
        assert row == (name, options.get("--key"))


@bounded(60)
@given(
    name=arguments, payload=arguments | json_texts.filter(lambda t: len(t) < 10_000), as_text=st.booleans()
)
def test_any_signal_is_sent_or_refused(
    stepwell: Run, shared_db: Db, name: str, payload: str, as_text: bool
) -> None:
    row = shared_db.execute("select stepwell.enqueue('w', key => 'signalled')").fetchone()
    assert row is not None
    before = counted(shared_db)
    result = stepwell("signal", *(["--text"] if as_text else []), "--", str(row[0]), name, payload)
    if result.exit_code:
        assert result.exit_code == 2
        assert counted(shared_db) == before
        return
    found = shared_db.execute("select name, payload::text from stepwell.signals order by id desc limit 1")
    sent = found.fetchone()
    assert sent is not None
    assert sent[0] == name
    if payload != "-":  # which is stdin, and empty
        assert repr(json.loads(sent[1])) == repr(payload if as_text else json.loads(payload))


@bounded(8)
@given(text=arguments)
def test_any_filter_finds_or_refuses(stepwell: Run, text: str) -> None:
    for command in (
        ("runs", "list", f"--workflow={text}", "--json"),
        ("runs", "cancel", f"--workflow={text}", "--dry-run", "--json"),
        ("runs", "retry", f"--error-like={text}", "--dry-run", "--json"),
        ("runs", "show", "--", text),
        ("runs", "stream", "--", text, text),
        ("runs", "fork", "--from", "1", f"--input={text}", "--", text),
        ("runs", "resolve", "--error", text, "--", text, text),
        ("runs", "rewind", f"--to={text}", "--", text),
    ):
        result = stepwell(*command)
        assert result.exit_code in ((0, 2) if "--dry-run" in command or "list" in command else (2,))


@bounded(50)
@given(
    cells=st.lists(st.lists(texts.map(lambda t: t.encode("utf-8", "surrogatepass")), max_size=3), max_size=4)
)
def test_any_csv_file_is_read_row_by_row(
    stepwell: Run, shared_db: Db, tmp_path: Path, cells: list[list[bytes]]
) -> None:
    rows(stepwell, shared_db, tmp_path / "rows.csv", b"a,n\n" + b"\n".join(b",".join(row) for row in cells))


@bounded(15)
@given(lines=st.lists(json_texts | texts, max_size=5))
def test_any_file_of_json_lines_is_read_row_by_row(
    stepwell: Run, shared_db: Db, tmp_path: Path, lines: list[str]
) -> None:
    content = "\n".join(f'{{"a": {line}}}' if line in JSON_TEXTS else line for line in lines)
    rows(stepwell, shared_db, tmp_path / "rows.jsonl", content.encode("utf-8", "surrogatepass"))


def rows(stepwell: Run, db: Db, file: Path, content: bytes) -> None:
    """Enqueue a file; see that each row is in, or among the rejects."""
    file.write_bytes(content)
    before = counted(db)
    assert before is not None
    result = stepwell("enqueue", "w", "--from", str(file), "--json")
    after = counted(db)
    assert after is not None
    if result.exit_code == 2:
        assert after == before
        return
    summary = json.loads(result.stdout)
    assert after[0] - before[0] == summary["enqueued"]
    if summary["rejected"]:
        assert Path(summary["rejects_file"]).exists()


# -- what was recorded, from the database and from files -------------------------------------------------

APP = """
from typing import Any
from worker import workflow

@workflow(name="recorded")
async def recorded(a: Any = None) -> Any:
    return a
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("app") / "hostile_recorded.py"
    file.write_text(APP)
    return str(file)


DEEP = [f"{'[' * levels}{']' * levels}" for levels in (900, 1_100, 1_500, 5_500)]


def test_runs_with_any_input_are_exported_and_rehearsed(
    stepwell: Run, shared_db: Db, app: str, tmp_path: Path
) -> None:
    """From the database as from the file: as many are told of, and each by itself."""
    count = 0
    for text in [*JSON_TEXTS, *DEEP]:
        try:
            shared_db.execute("select stepwell.enqueue('recorded', %s)", [f'{{"a":{text}}}'])
        except psycopg.Error:
            continue  # what Postgres does not take
        count += 1
    exported = stepwell("runs", "export", "--workflow", "recorded", "--output", "all.jsonl")
    assert exported.exit_code == 0
    lines = (tmp_path / "all.jsonl").read_bytes().splitlines()
    assert len(lines) == count
    from_database = stepwell("replay", app, "--workflow", "recorded", "--json")
    assert from_database.exit_code == 1
    assert json.loads(from_database.stdout)["replayed"] == count
    assert json.loads(from_database.stdout)["mismatches"]
    unreadable = 0
    for line in lines:
        (tmp_path / "one.jsonl").write_bytes(line)
        result = stepwell("replay", app, "--file", "one.jsonl", "--json")
        if result.exit_code == 2:
            unreadable += 1
            assert "one.jsonl, line 1: this is no exported run" in result.stderr
            with pytest.raises((msgspec.DecodeError, RecursionError)):
                msgspec.json.decode(line)
        else:
            assert json.loads(result.stdout)["replayed"] == 1
    assert unreadable >= 1


_fields = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just('"01a22080-3091-762d-9646-d7b84f6c6521"') | json_texts,
        "workflow": st.just('"recorded"') | json_texts,
        "state": st.just('"open"') | json_texts,
        "created_at": st.just('"2026-01-02T03:04:05Z"') | json_texts,
        "input": json_texts.map(lambda text: f'{{"a":{text}}}') | json_texts,
        "labels": json_texts,
        "epoch": json_texts,
        "seed": json_texts,
        "history": st.just("[]") | json_texts | json_texts.map(
            lambda text: '[{"path":[1],"n":0,"kind":"epoch","name":"x","outcome":"rewind","seq":1,'
            f'"at":"2026-01-02T03:04:05Z","value":{text},"error":{{"type":"x","data":{text}}}}}]'
        ),
    },
)  # fmt: skip
_KNOWN = {
    "id": '"01a22080-3091-762d-9646-d7b84f6c6521"', "workflow": '"recorded"', "state": '"open"',
    "created_at": '"2026-01-02T03:04:05Z"', "input": "{}", "history": "[]",
}  # fmt: skip
_lines = (
    _fields.map(lambda fields: {**_KNOWN, **fields}).map(
        lambda fields: "{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}"
    )
    | json_texts
    | texts.filter(lambda text: "\n" not in text)
)


@bounded(80)
@given(lines=st.lists(_lines.map(lambda t: t.encode("utf-8", "surrogatepass")), min_size=1, max_size=2))
def test_any_file_is_rehearsed_or_told_by_its_line(
    stepwell: Run, app: str, tmp_path: Path, lines: list[bytes]
) -> None:
    (tmp_path / "any.jsonl").write_bytes(b"\n".join(lines))
    result = stepwell("replay", app, "--file", "any.jsonl")
    if result.exit_code == 2:
        assert "any.jsonl, line " in result.stderr


def test_a_file_that_is_no_text_is_told_by_its_line(stepwell: Run, app: str, tmp_path: Path) -> None:
    for raw in (b"\xff\xfe\x00", b'{"a":"\xff"}', *(f'{{"a":{text}}}'.encode() for text in DEEP)):
        known = ",".join(f'"{name}":{text}' for name, text in {**_KNOWN, "input": ""}.items() if text)
        (tmp_path / "raw.jsonl").write_bytes(f"{{{known}".encode() + b',"input":' + raw + b"}")
        result = stepwell("replay", app, "--file", "raw.jsonl")
        assert result.exit_code == 2 or raw.count(b"[") == 900
        if result.exit_code == 2:
            assert "raw.jsonl, line 1: this is no exported run" in result.stderr


@bounded(25)
@given(text=arguments)
def test_any_key_is_forgotten_or_refused(stepwell: Run, shared_db: Db, text: str) -> None:
    before = counted(shared_db)
    for command in (
        ("forget", f"--key={text}", "--dry-run", "--json"),
        ("forget", f"--key={text}", f"--workflow={text}", "--dry-run"),
    ):
        result = stepwell(*command)
        assert result.exit_code in (0, 2)
    asked = stepwell("forget", "--key", "-", input=f"{text}\n".encode("utf-8", "surrogateescape"))
    assert asked.exit_code in (0, 1, 2)
    assert counted(shared_db) == before


def test_whatever_looks_sealed_is_counted_by_its_key_or_not_at_all(stepwell: Run, shared_db: Db) -> None:
    for text in [*JSON_TEXTS, *DEEP]:
        with contextlib.suppress(psycopg.Error):
            shared_db.execute("select stepwell.enqueue('sealed', %s)", [f'{{"stepwell:sealed":{text}}}'])
            shared_db.execute("select stepwell.enqueue('sealed', %s)", [f'{{"a":{text}}}'])
    for name in ("k", "\x1b[2J", "\u202e", "[bold]", "a" * 5_000):
        sealed = json.dumps({"stepwell:sealed": {"k": name, "d": "AA=="}})
        shared_db.execute("select stepwell.enqueue('sealed', %s)", [sealed])
    shown = stepwell("encryption", "status", "--json")
    assert shown.exit_code == 0
    found = {each["key"] for each in json.loads(shown.stdout)["keys"]}
    assert found >= {"k", "1"}
    assert not found & {"\x1b[2J", "\u202e", "[bold]"}
    assert stepwell("encryption", "status").exit_code == 0


# -- what is shown -------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(db: Db) -> str:
    """A failed run with what drives a terminal wherever there can be text."""
    text = json.dumps(TERMINAL)
    labels = json.dumps({TERMINAL: TERMINAL})
    row = db.execute(
        "select stepwell.enqueue(%s, %s, key => %s, queue => %s, labels => %s, version => %s)",
        [TERMINAL, f"{{{text}: {text}}}", TERMINAL, TERMINAL, labels, TERMINAL],
    ).fetchone()
    assert row is not None
    run = str(row[0])
    claimant = Claimant(db, (f"{TERMINAL}@{TERMINAL}",), (TERMINAL,))
    claim = claimant.claim(TERMINAL)
    db.execute("select stepwell.signal(%s, %s, %s)", [run, TERMINAL, text])
    db.execute("insert into stepwell.state values (%s, %s, %s)", [run, TERMINAL, text])
    db.execute("insert into stepwell.stream values (%s, 0, 1, %s, %s)", [run, TERMINAL, text])
    fault = {"type": TERMINAL, "message": TERMINAL, "trace": TERMINAL, "data": TERMINAL}
    claimant.flush(
        claim,
        "move",
        claimant.record([1], 0, "completed", name=TERMINAL, value=TERMINAL),
        claimant.record([2], 1, "failed", name=TERMINAL, error=fault),
        doing=[2],
    )
    end = {"path": [], "n": 0, "kind": "run", "name": "w", "outcome": "failed", "error": fault}
    assert claimant.flush(claim, "finish", end, end={"state": "failed", "error": fault}) == 1
    return run


@pytest.mark.parametrize("shape", ["text", "json"])
def test_nothing_that_is_shown_drives_the_terminal(
    poisoned: str, database_url: str, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", database_url)
    as_json = ["--json"] if shape == "json" else []
    for command in (
        ["runs", "list"], ["runs", "show", poisoned], ["runs", "state", poisoned], ["runs", "stream", poisoned],
        ["runs", "retry", "--status", "failed", "--dry-run"], ["runs", "cancel", poisoned],
        ["runs", "list", "--workflow", TERMINAL], ["enqueue", TERMINAL, "{}"],
        ["enqueue", TERMINAL, "{}", "--key", TERMINAL, "--allow-unknown", "--version", TERMINAL, "--wait"],
        ["signal", poisoned, TERMINAL], ["signal", poisoned, "go", TERMINAL],
    ):  # fmt: skip
        result = CliRunner().invoke(main, [*command, *as_json])
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            command,
            result.exception,
        )
        assert result.output, command
        assert drives_a_terminal(result.output) == "", (command, result.output[:400])


def test_json_that_is_shown_says_what_was_stored(
    poisoned: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", database_url)
    shown = json.loads(CliRunner().invoke(main, ["runs", "show", poisoned, "--json"]).stdout)
    assert shown["run"]["input"] == {TERMINAL: TERMINAL}
    assert shown["run"]["workflow"] == shown["run"]["key"] == TERMINAL
    assert shown["state"] == {TERMINAL: TERMINAL}
    assert shown["history"][0]["value"] == TERMINAL


def test_bytes_that_are_no_text_are_told_by_a_real_process(shared: str, tmp_path: Path) -> None:
    """The interpreter makes half characters of them, which neither the database nor the terminal takes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STEPWELL_DATABASE_URL": shared}
    for command in ((b"enqueue", b"\xff\xfe", b"{}"), (b"runs", b"list", b"--workflow", b"\xff")):
        said = subprocess.run(
            [sys.executable.encode(), b"-m", b"worker.cli", *command],
            cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert said.returncode == 2, said.stderr
        assert said.stderr.startswith(b"stepwell: "), said.stderr
        assert said.stderr.count(b"\n") == 1


def test_the_texts_are_worth_trying() -> None:
    assert any(drives_a_terminal(text) for text in TEXTS)
    assert drives_a_terminal(TERMINAL) == "".join(sorted(set(TERMINAL) - set("[2J]0;mine31m")))
