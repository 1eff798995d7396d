"""The commands against a real database: what they do, print and exit with."""

from __future__ import annotations

import itertools
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psycopg
import pytest
from click.testing import CliRunner, Result

from outbox import embedded
from outbox.codec import Signature
from outbox.settings import Settings
from tests.waiting import wait_until
from worker.cli import main

Db = psycopg.Connection[Any]
Run = Callable[..., Result]

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Lead:
    id: int
    name: str
    email: str | None = None


def welcome(lead: Lead) -> int:
    return lead.id


FLOWS = """
from dataclasses import dataclass
from worker import Permanent, sleep, step, workflow

@dataclass
class Lead:
    id: int
    name: str
    email: str | None = None

@step
async def greet(lead: Lead) -> str:
    if lead.name == "bad":
        raise Permanent("no such mailbox")
    return f"hello {lead.name}"

@workflow
async def welcome(lead: Lead) -> int:
    await greet(lead)
    if lead.name == "slow":
        await sleep(3600)
    return lead.id

@workflow(queue="elsewhere")
async def wave(times: int = 1) -> int:
    return times
"""


@pytest.fixture
def stepwell(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in an empty directory, with the test's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", database_url)

    def run(*arguments: str, input: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(main, [*arguments], input=input, catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def published(db: Db) -> None:
    """`welcome` as a worker has published it."""
    schema = json.dumps(Signature.of(welcome).json_schema())
    db.execute("insert into stepwell.workflows values ('welcome', '', %s, 'default')", [schema])
    db.execute("insert into stepwell.workflows values ('wave', '', '{}', 'elsewhere')")


def count(db: Db) -> int:
    row = db.execute("select count(*) from stepwell.runs").fetchone()
    assert row is not None
    return int(row[0])


def one(result: Result) -> str:
    """Return the one sentence that a mistake is told in."""
    assert result.stdout == ""
    assert result.stderr.startswith("stepwell: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


LEAD = '{"lead": {"id": 1, "name": "Ada"}}'


# -- enqueue: one run ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("published")
def test_enqueue_prints_the_id_of_the_run(stepwell: Run, db: Db) -> None:
    result = stepwell("enqueue", "welcome", LEAD, "--label", "source=web", "--priority", "2", "--delay", "1h")
    assert result.exit_code == 0
    row = db.execute(
        "select r.id, r.queue, r.priority, r.labels, t.state from stepwell.runs r join stepwell.tasks t on run_id = r.id"
    ).fetchone()
    assert row == (uuid.UUID(result.stdout.strip()), "default", 2, {"source": "web"}, "waiting")


@pytest.mark.usefixtures("published")
def test_a_key_that_is_known_gives_the_first_run(stepwell: Run, db: Db) -> None:
    first = stepwell("enqueue", "welcome", LEAD, "--key", "1")
    second = stepwell("enqueue", "welcome", LEAD, "--key", "1")
    assert second.exit_code == 0
    assert second.stdout == first.stdout
    assert "first run" in second.stderr
    third = stepwell("enqueue", "welcome", LEAD, "--key", "1", "--json")
    assert json.loads(third.stdout) == {"id": first.stdout.strip(), "created": False}
    assert count(db) == 1


@pytest.mark.usefixtures("published")
def test_the_input_can_come_from_stdin_and_the_queue_from_the_workflow(stepwell: Run, db: Db) -> None:
    assert stepwell("enqueue", "wave", "-", input='{"times": 3}').exit_code == 0
    assert stepwell("enqueue", "wave").exit_code == 0
    assert stepwell("enqueue", "wave", "--queue", "mine").exit_code == 0
    assert stepwell("enqueue", "wave", "-", input=b'{"\xff": 3}').exit_code == 2
    rows = db.execute("select queue, input::text from stepwell.runs order by id").fetchall()
    assert rows == [("elsewhere", '{"times":3}'), ("elsewhere", "{}"), ("mine", "{}")]


@pytest.mark.usefixtures("published")
def test_runs_go_on_with_a_trace_that_is_given(stepwell: Run, db: Db, tmp_path: Path) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    (tmp_path / "waves.csv").write_text("times\n1\n2\n")
    run = stepwell("enqueue", "welcome", LEAD, "--traceparent", trace).stdout.strip()
    assert stepwell("enqueue", "wave", "--from", "waves.csv", "--traceparent", trace).exit_code == 0
    assert db.execute("select distinct trace, count(*) from stepwell.runs group by 1").fetchall() == [
        (trace, 3)
    ]
    shown = json.loads(stepwell("runs", "show", run, "--json").stdout)
    assert shown["run"]["trace_id"] == trace.split("-")[1]


MISTAKES = [
    (["welcom", LEAD], "no workflow is called 'welcom'; did you mean welcome?"),
    (["charge", LEAD], "no workflow is called 'charge'; workers have published wave, welcome"),
    (["welcome", '{"lead": '], "input of workflow 'welcome' is not valid JSON: expecting value at line 1, column 10"),
    (["welcome", '{\n"lead": nope}'], "expecting value at line 2, column 9"),
    (["welcome", "[" * 100_000], "is not valid JSON: "),
    (["welcome", '{"lead": NaN}'], "is not valid JSON: NaN is no JSON number"),
    (["welcome", "[1]"], "must be an object, parameter name to value"),
    (["welcome", "{}"], "field lead: is missing"),
    (["welcome", '{"lead": {"id": "1", "name": "Ada"}}'], "field lead.id: expected `int`, got `str`"),
    (["welcome", '{"lead": {"id": 1}}'], "field lead.name: is missing"),
    (["welcome", '{"lead": {"id": 1, "name": "Ada"}, "x": 1}'], "field x: no such field is known here"),
    (["welcome", '{"lead": {"id": 1, "name": "\\u0000"}}'], "lead.name"),
    (["welcome", '{"lead": {"id": 1, "name": "\\ud800"}}'], "lead.name"),
    (["welcome", '{"lead": {"id": 1, "name": "%s"}}' % ("x" * 1_100_000)], "1,048,576"),
    (["welcome", LEAD, "--key", "k" * 600], "a key has at most 512 bytes"),
    (["welcome", LEAD, "--queue", "stepwell"], "queue"),
]  # fmt: skip


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_is_one_sentence_with_status_2_and_nothing_is_enqueued(
    stepwell: Run, db: Db, arguments: list[str], said: str
) -> None:
    result = stepwell("enqueue", *arguments)
    assert result.exit_code == 2
    assert said in one(result)
    assert len(result.stderr) < 500
    assert count(db) == 0


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    "arguments",
    [
        ["welcome", LEAD, "--priority", "10"],
        ["welcome", LEAD, "--delay", "soon"],
        ["welcome", LEAD, "--at", "tomorrow"],
        ["welcome", LEAD, "--label", "a"],
        ["welcome", LEAD, "--traceparent", "00-1-2-01"],
        ["welcome", LEAD, "--timeout", "5"],
        ["welcome", LEAD, "--key-field", "id"],
        ["welcome", LEAD, "--from", "x.csv"],
        ["welcome", "--from", "x.csv", "--wait"],
        ["welcome", "--from", "x.csv", "--key", "1"],
        [],
    ],
)
def test_options_that_make_no_sense_are_refused(stepwell: Run, db: Db, arguments: list[str]) -> None:
    assert stepwell("enqueue", *arguments).exit_code == 2
    assert count(db) == 0


def test_unknown_names_are_enqueued_when_that_is_asked_for(stepwell: Run, db: Db) -> None:
    assert "--allow-unknown" in one(stepwell("enqueue", "later", "{}"))
    assert stepwell("enqueue", "later", '{"any": "thing"}', "--allow-unknown").exit_code == 0
    assert count(db) == 1


@contextmanager
def flows(directory: Path) -> Iterator[str]:
    """Yield the path of an APP under a name that no other test has, and forget it afterwards."""
    name = f"flows_{uuid.uuid4().hex}"
    path = directory / f"{name}.py"
    path.write_text(FLOWS)
    try:
        yield str(path)
    finally:
        sys.modules.pop(name, None)


def test_an_app_checks_without_a_worker(database_url: str, db: Db, tmp_path: Path) -> None:
    def stepwell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command(arguments, database_url=database_url, cwd=tmp_path)

    with flows(tmp_path) as app:
        assert stepwell("enqueue", "welcome", LEAD, "--app", app).returncode == 0
        wrong = stepwell("enqueue", "welcome", '{"lead": {"id": 1}}', "--app", app)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "field lead.name: is missing" in wrong.stderr
        missing = stepwell("enqueue", "welcome", LEAD, "--app", "nowhere.py")
        assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
        assert "did you mean welcome?" in stepwell("enqueue", "welcom", "{}", "--app", app).stderr
    (tmp_path / "worker.py").write_text(FLOWS)
    hiding = stepwell("enqueue", "welcome", LEAD, "--app", "worker.py")
    assert (hiding.returncode, hiding.stderr.count("\n")) == (2, 1)
    assert "rename" in hiding.stderr
    assert count(db) == 1


@pytest.mark.parametrize("name", ["worker", "outbox"])
@pytest.mark.parametrize("as_directory", [False, True])
def test_a_module_of_the_users_that_hides_ours_is_said_in_a_sentence(
    tmp_path: Path, name: str, as_directory: bool
) -> None:
    theirs = tmp_path / (f"{name}/__init__.py" if as_directory else f"{name}.py")
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "stepwell", "runs", "list"],
        env=environment("", PYTHONPATH=path), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"stepwell: {theirs} hides Stepwell's own package {name!r}: rename it")
    assert done.stderr.count("\n") == 1


def test_a_database_that_cannot_be_reached_is_one_sentence_with_status_1(
    stepwell: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_DATABASE_URL", "postgresql://u:secret@127.0.0.1:1/x")
    result = stepwell("enqueue", "welcome", LEAD)
    assert result.exit_code == 1
    assert "cannot be used" in one(result)
    assert "secret" not in result.stderr


@pytest.mark.direct  # who it reached behind a pooler is a matter of the pooler
@pytest.mark.usefixtures("published")
def test_a_database_that_takes_no_writes_is_one_sentence_with_status_1(
    stepwell: Run, database_url: str, db: Db
) -> None:
    name = urlsplit(database_url).path.removeprefix("/")
    db.execute(f"alter database {name} set default_transaction_read_only = on".encode())
    result = stepwell("enqueue", "welcome", LEAD)
    assert result.exit_code == 1
    assert one(result).startswith("stepwell: the database takes no writes here (cannot execute INSERT")
    assert count(db) == 0


def test_a_url_that_is_none_is_one_sentence_with_status_2(stepwell: Run) -> None:
    result = stepwell("enqueue", "welcome", LEAD, "--database-url", "mysql://x")
    assert result.exit_code == 2
    assert "not the address of a Postgres database" in one(result)


def test_a_database_without_the_schema_is_left_as_it_is(stepwell: Run, empty_database_url: str) -> None:
    for arguments in (["enqueue", "welcome", LEAD], ["runs", "list"], ["runs", "show", "0193"]):
        result = stepwell(*arguments, "--database-url", empty_database_url)
        assert result.exit_code == 2
        assert "run `stepwell migrate`" in one(result)
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("select to_regclass('stepwell.runs')").fetchone() == (None,)


def test_a_role_that_may_not_read_the_names_is_told_what_helps(
    stepwell: Run, db: Db, database_url: str
) -> None:
    role = f"producer_{uuid.uuid4().hex[:8]}"
    db.execute(f"create role {role} login in role stepwell_producer")
    try:
        url = database_url.replace("postgres@", f"{role}@", 1)
        assert "--allow-unknown" in one(stepwell("enqueue", "welcome", LEAD, "--database-url", url))
        assert stepwell("enqueue", "welcome", LEAD, "--allow-unknown", "--database-url", url).exit_code == 0
        listed = stepwell("runs", "list", "--database-url", url)
        assert listed.exit_code == 2
        assert "stepwell_viewer" in one(listed)
    finally:
        db.execute(f"drop owned by {role}; drop role {role}")


# -- enqueue: files ------------------------------------------------------------------------------------

CSV = (
    'id,name,email\n1,Ada,ada@x.example\nx,Broken,\n2,Élodie,\n3,"unclosed,\n1,Again,\n,No id,\n4,\n5,a,b,c\n'
)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("by_app", [False, True])
def test_good_rows_go_in_and_bad_ones_to_the_rejects(
    stepwell: Run, db: Db, tmp_path: Path, by_app: bool, database_url: str
) -> None:
    (tmp_path / "leads.csv").write_text(CSV)
    arguments = ["enqueue", "welcome", "--from", "leads.csv", "--key-field", "id"]
    if by_app:
        with flows(tmp_path) as app:
            done = command([*arguments, "--app", app], database_url=database_url, cwd=tmp_path)
            stdout, status = done.stdout, done.returncode
    else:
        result = stepwell(*arguments)
        stdout, status = result.stdout, result.exit_code
    assert status == 0
    assert stdout == "enqueued 3, duplicates 1, rejected 4 (see leads.csv.rejects.csv)\n"
    rejects = (tmp_path / "leads.csv.rejects.csv").read_text().splitlines()
    assert rejects[0] == "id,name,email,reason"
    assert [line.rpartition("line ")[2].split(",")[0].split(":")[0] for line in rejects[1:]] == [
        "3",
        "5",
        "7",
        "9",
    ]
    rows = db.execute(
        "select k.key, r.input->'lead'->>'name' from stepwell.keys k join stepwell.runs r on id = run_id order by 1"
    ).fetchall()
    assert rows == [("1", "Ada"), ("2", "Élodie"), ("4", "")]

    again = stepwell(*arguments, "--json")
    assert json.loads(again.stdout) == {
        "enqueued": 0, "duplicates": 4, "rejected": 4, "rejects_file": "leads.csv.rejects.csv"
    }  # fmt: skip
    assert count(db) == 3


@pytest.mark.usefixtures("published")
def test_json_lines_are_inputs_or_their_one_parameter(stepwell: Run, db: Db, tmp_path: Path) -> None:
    lines = [
        LEAD,
        '{"id": 2, "name": "Bob"}',
        '{"id": "3", "name": "text"}',
        '{"name": "no key"}',
        "{",
        '{"id": true}',
    ]
    (tmp_path / "leads.jsonl").write_text("\n".join(lines))
    result = stepwell("enqueue", "welcome", "--from", "leads.jsonl", "--key-field", "id")
    assert result.stdout == "enqueued 2, duplicates 0, rejected 4 (see leads.jsonl.rejects.jsonl)\n"
    rejects = [json.loads(line) for line in (tmp_path / "leads.jsonl.rejects.jsonl").read_text().splitlines()]
    assert "line 3, field id: expected `int`" in rejects[0]["reason"]
    assert rejects[2] == {"line": "{", "reason": rejects[2]["reason"]}
    assert db.execute("select key from stepwell.keys order by 1").fetchall() == [("1",), ("2",)]


@pytest.mark.usefixtures("published")
def test_a_file_of_nothing_but_rejects_is_a_failure(stepwell: Run, tmp_path: Path) -> None:
    (tmp_path / "leads.csv").write_text("id,name\nx,y\n")
    assert stepwell("enqueue", "welcome", "--from", "leads.csv").exit_code == 1


@pytest.mark.usefixtures("published")
def test_many_rows_are_enqueued_in_their_order(stepwell: Run, db: Db, tmp_path: Path) -> None:
    (tmp_path / "leads.csv").write_text("id,name\n" + "".join(f"{n},Ada\n" for n in range(2500)))
    result = stepwell("enqueue", "welcome", "--from", "leads.csv", "--key-field", "id")
    assert result.stdout == "enqueued 2,500, duplicates 0, rejected 0\n"
    assert not (tmp_path / "leads.csv.rejects.csv").exists()
    rows = db.execute(
        "select (input->'lead'->>'id')::int from stepwell.runs r join stepwell.tasks t on run_id = r.id order by turn"
    )
    assert [row[0] for row in rows] == list(range(2500))


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "missing.csv"], "cannot read missing.csv: No such file"),
        (["--from", "leads.txt"], "must end in .csv or .jsonl"),
        (["--from", "leads.csv", "--key-field", "nr"], "has no column 'nr'; its columns are id, name"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    stepwell: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "leads.csv").write_text("id,name\n1,Ada\n")
    result = stepwell("enqueue", "welcome", *arguments)
    assert result.exit_code == 2
    assert said in one(result)


@pytest.mark.usefixtures("published")
def test_the_progress_bar_is_for_terminals_only(stepwell: Run, database_url: str, tmp_path: Path) -> None:
    (tmp_path / "leads.csv").write_text("id,name\n1,Ada\n")
    arguments = ["enqueue", "welcome", "--from", "leads.csv"]
    assert stepwell(*arguments).stderr == ""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = command(arguments, database_url=database_url, cwd=tmp_path, stderr=theirs)
        os.close(theirs)
        assert done.returncode == 0
        assert b"1 enqueued" in drained(terminal.fileno())
    assert done.stdout == "enqueued 1, duplicates 0, rejected 0\n"


# -- runs ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("published")
def test_runs_are_listed_shown_and_cancelled(stepwell: Run, db: Db) -> None:
    assert stepwell("runs", "list").stderr == "no runs\n"
    run = stepwell("enqueue", "welcome", LEAD, "--key", "k-1", "--label", "a=b").stdout.strip()
    listed = json.loads(stepwell("runs", "list", "--status", "pending", "--json").stdout)
    assert [each["id"] for each in listed] == [run]
    assert run in stepwell("runs", "list", "--workflow", "welcome").stdout
    assert json.loads(stepwell("runs", "list", "--workflow", "other", "--json").stdout) == []

    shown = stepwell("runs", "show", run)
    assert shown.exit_code == 0
    for part in (run, "welcome", "pending", "key k-1", "a=b", "not running", "no live worker"):
        assert part in shown.stdout
    details = json.loads(stepwell("runs", "show", run[:13], "--json").stdout)
    assert set(details) == {"run", "history", "tasks", "children", "state", "why"}
    assert details["run"]["status"] == "pending"
    assert details["tasks"][0]["state"] == "ready"
    assert "no live worker" in details["why"]

    cancelled = stepwell("runs", "cancel", run)
    assert (cancelled.exit_code, cancelled.stdout) == (0, f"{run} asked to end\n")
    row = db.execute("select count(*) from stepwell.tasks where kind = 'wake'").fetchone()
    assert row == (1,)


@pytest.mark.usefixtures("published")
def test_a_retry_of_an_open_run_fails_and_the_others_go_on(stepwell: Run, db: Db) -> None:
    open_run, failed = (stepwell("enqueue", "welcome", LEAD).stdout.strip() for _ in range(2))
    db.execute("update stepwell.runs set state = 'failed', finished_at = now() where id = %s; ", [failed])
    db.execute("delete from stepwell.tasks where run_id = %s", [failed])
    result = stepwell("runs", "retry", open_run, failed)
    assert result.exit_code == 1
    assert result.stdout == f"{failed} is ready again\n"
    assert f"run {open_run} is open" in result.stderr
    assert [
        each["error"] is None for each in json.loads(stepwell("runs", "cancel", "--json", failed).stdout)
    ] == [True]


@pytest.mark.usefixtures("published")
def test_a_run_is_named_by_the_unique_beginning_of_its_id(stepwell: Run, db: Db) -> None:
    runs = sorted(stepwell("enqueue", "welcome", LEAD).stdout.strip() for _ in range(2))
    common = "".join(
        a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*runs, strict=True))
    )
    assert "more than one run" in one(stepwell("runs", "show", common))
    assert runs[0] in stepwell("runs", "show", runs[0][: len(common) + 2].upper()).stdout
    for wrong in ("zzzz", "018", "01890a5d-ac96-774b-bcce-b302099a8057"):
        assert stepwell("runs", "show", wrong).exit_code == 2
    assert one(stepwell("runs", "cancel", runs[0], "01890a5d-ac96"))
    assert db.execute("select count(*) from stepwell.tasks where kind = 'wake'").fetchone() == (0,)


@pytest.mark.usefixtures("published")
def test_colours_are_for_terminals_and_no_color_is_heard(
    stepwell: Run, database_url: str, tmp_path: Path
) -> None:
    run = stepwell("enqueue", "welcome", LEAD).stdout.strip()
    assert "\x1b[" not in stepwell("runs", "show", run).stdout
    coloured, plain = (
        on_a_terminal(["runs", "show", run], database_url, tmp_path, NO_COLOR=value) for value in ("", "1")
    )
    assert b"\x1b[36mpending" in coloured
    assert b"\x1b[36mpending" not in plain
    assert b"pending" in plain


# -- what is exchanged with a run ----------------------------------------------------------------------


SIGNALS = [
    ((), None),
    (("17",), 17),
    (('{"by": "Ada", "n": [1, null]}',), {"by": "Ada", "n": [1, None]}),
    (('"a text"',), "a text"),
    (("plain text", "--text"), "plain text"),
    (("17", "--text"), "17"),
    (("--", "-17"), -17),
    (("-",), {"from": "stdin"}),
]


@pytest.mark.usefixtures("published")
def test_a_signal_is_sent_with_json_or_a_text(stepwell: Run, db: Db) -> None:
    run = stepwell("enqueue", "welcome", LEAD).stdout.strip()
    for arguments, _ in SIGNALS:
        result = stepwell("signal", run[:23], "approved", *arguments, input='{"from": "stdin"}')
        assert (result.exit_code, result.stdout) == (0, f"{run} was sent 'approved'\n"), result.stderr
    rows = db.execute("select payload::text from stepwell.signals order by id").fetchall()
    assert [json.loads(text) for (text,) in rows] == [payload for _, payload in SIGNALS]
    assert json.loads(stepwell("signal", run, "s", "--json").stdout) == {"id": run, "sent": True}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["approved", "yes"], "the payload of signal 'approved' is not valid JSON: expecting value at line 1, column 1; with --text"),
        (["approved", "{"], "column 2"),
        (["approved", "NaN"], "NaN is no JSON number"),
        (["stepwell:child:1"], "Stepwell's own"),
        (["x" * 300], "1 to 255 bytes"),
        (["approved", '"%s"' % ("x" * 1_100_000)], "1,048,576"),
    ],
)  # fmt: skip
def test_a_signal_that_cannot_be_is_one_sentence(
    stepwell: Run, db: Db, arguments: list[str], said: str
) -> None:
    run = stepwell("enqueue", "welcome", LEAD).stdout.strip()
    result = stepwell("signal", run, *arguments)
    assert result.exit_code == 2
    assert said in one(result)
    assert db.execute("select count(*) from stepwell.signals").fetchone() == (0,)


@pytest.mark.usefixtures("published")
def test_a_signal_to_a_run_that_has_ended_fails(stepwell: Run, db: Db) -> None:
    run = stepwell("enqueue", "welcome", LEAD).stdout.strip()
    db.execute("update stepwell.runs set state = 'succeeded', finished_at = now()")
    result = stepwell("signal", run, "approved")
    assert result.exit_code == 1
    assert f"run {run} has ended already" in one(result)
    assert stepwell("signal", "01890a5d-ac96", "approved").exit_code == 2


@pytest.mark.usefixtures("published")
def test_state_and_progress_are_shown(stepwell: Run, db: Db) -> None:
    run = stepwell("enqueue", "welcome", LEAD).stdout.strip()
    empty = stepwell("runs", "state", run)
    assert (empty.exit_code, empty.stdout, empty.stderr) == (0, "", "it shows nothing of itself\n")
    long = "x" * 500
    db.execute(
        "insert into stepwell.state values (%s, 'progress', '{\"done\":3,\"total\":12}'), (%s, 'note', %s)",
        [run, run, json.dumps(long)],
    )
    shown = stepwell("runs", "state", run[:23]).stdout
    assert "3 of 12 (25%)" in shown
    assert long in shown
    assert json.loads(stepwell("runs", "state", run, "--json").stdout) == {
        "note": long, "progress": {"done": 3, "total": 12}
    }  # fmt: skip
    assert "3 of 12" in stepwell("runs", "list").stdout
    assert "3 of 12 (25%)" in stepwell("runs", "show", run).stdout
    details = json.loads(stepwell("runs", "show", run, "--json").stdout)
    assert (details["run"]["progress"], details["state"]["note"]) == ({"done": 3, "total": 12}, long)


@pytest.mark.usefixtures("published")
def test_a_stream_is_printed_and_followed_to_its_end(
    stepwell: Run, db: Db, database_url: str, tmp_path: Path
) -> None:
    run = stepwell("enqueue", "welcome", LEAD).stdout.strip()
    insert = (
        "insert into stepwell.stream (run_id, epoch, n, name, value) values (%s, 0, %s, %s, to_json(%s::int))"
    )
    for n, name in enumerate(("log", "log", "other"), 1):
        db.execute(insert, [run, n, name, n])
    printed = stepwell("runs", "stream", run[:23]).stdout.splitlines()
    assert [line.split()[-2:] for line in printed] == [["log", "1"], ["log", "2"], ["other", "3"]]
    told = [json.loads(line) for line in stepwell("runs", "stream", run, "log", "--json").stdout.splitlines()]
    assert [(item["position"], item["n"], item["name"], item["value"]) for item in told] == [
        (1, 1, "log", 1), (2, 2, "log", 2)
    ]  # fmt: skip
    assert stepwell("runs", "stream", run, "log", "--after", "2").stdout == ""

    with subprocess.Popen(
        [sys.executable, "-P", "-m", "stepwell", "runs", "stream", run, "--follow", "--json"],
        env=environment(database_url), cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    ) as following:  # fmt: skip
        assert following.stdout is not None
        assert [json.loads(following.stdout.readline())["value"] for _ in range(3)] == [1, 2, 3]
        db.execute(insert, [run, 4, "log", 4])
        assert json.loads(following.stdout.readline())["value"] == 4
        db.execute("update stepwell.runs set state = 'succeeded', finished_at = now()")
        assert following.wait(20) == 0


@pytest.mark.usefixtures("published")
def test_children_are_shown_with_their_parent(stepwell: Run, db: Db) -> None:
    parent, child = (stepwell("enqueue", "welcome", LEAD).stdout.strip() for _ in range(2))
    db.execute(
        "update stepwell.runs set parent_id = %s, parent_path = '{2,1,1}' where id = %s", [parent, child]
    )
    shown = stepwell("runs", "show", parent).stdout
    assert f"run {child}" in shown
    assert "child welcome" in shown
    assert f"child of {parent}" in stepwell("runs", "show", child).stdout
    details = json.loads(stepwell("runs", "show", parent, "--json").stdout)
    assert details["children"] == [{"id": child, "workflow": "welcome", "status": "pending", "path": "2.1.1"}]


# -- migrate -------------------------------------------------------------------------------------------


def test_migrate_checks_prints_installs_and_then_has_nothing_to_do(
    stepwell: Run, empty_database_url: str
) -> None:
    def migrate(*options: str) -> Result:
        return stepwell("migrate", *options, "--database-url", empty_database_url)

    behind = migrate("--check")
    assert behind.exit_code == 1
    assert "run `stepwell migrate`" in behind.stdout
    printed = migrate("--print").stdout
    assert "create schema stepwell" in printed
    assert migrate("--check", "--json").exit_code == 1
    assert json.loads(migrate("--json").stdout)["applied"]
    assert migrate().stdout.startswith("up to date")
    assert migrate("--check").exit_code == 0
    assert migrate("--print").stdout == ""
    assert migrate("--check", "--print").exit_code == 2


# -- the worker ----------------------------------------------------------------------------------------


def environment(database_url: str, **more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("STEPWELL_", "NO_COLOR"))
    }
    return {**kept, "STEPWELL_DATABASE_URL": database_url, "PYTHONPATH": str(ROOT), **more}


def command(
    arguments: Sequence[str], *, database_url: str, cwd: Path, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "stepwell", *arguments],
        env=environment(database_url), cwd=cwd, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False, timeout=60,
    )  # fmt: skip


def drained(terminal: int) -> bytes:
    """Return what was written to the other end of a pseudo-terminal that nobody holds open any more."""
    seen = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            return seen
        if not chunk:
            return seen
        seen += chunk


def on_a_terminal(arguments: Sequence[str], database_url: str, cwd: Path, **variables: str) -> bytes:
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-P", "-m", "stepwell", *arguments],
        env=environment(database_url, TERM="xterm-256color", **variables), cwd=cwd, stdout=theirs, check=True, timeout=60,
    )  # fmt: skip
    os.close(theirs)
    try:
        return drained(ours)
    finally:
        os.close(ours)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


@contextmanager
def worker(database_url: str, directory: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with flows(directory) as app, (directory / "worker.log").open("wb") as log:
        arguments = [app, "--processes", "2", "--metrics-port", str(port), *options]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stepwell", "worker", *arguments],
            env=environment(database_url, TMPDIR=str(directory)), cwd=directory, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_worker_runs_what_is_enqueued_serves_its_metrics_and_drains(
    stepwell: Run, database_url: str, db: Db, tmp_path: Path
) -> None:
    port = free_port()
    with worker(database_url, tmp_path, port) as process:
        wait_until(lambda: is_ready(port), 60)
        done = stepwell("enqueue", "welcome", LEAD, "--wait", "--timeout", "30")
        assert (done.exit_code, done.stdout) == (0, "1\n")
        failed = stepwell("enqueue", "welcome", '{"lead": {"id": 2, "name": "bad"}}', "--wait", "--json")
        assert failed.exit_code == 1
        assert json.loads(failed.stdout)["status"] == "failed"
        assert "no such mailbox" in failed.stderr
        late = stepwell(
            "enqueue", "welcome", '{"lead": {"id": 3, "name": "slow"}}', "--wait", "--timeout", "500ms"
        )
        assert late.exit_code == 1
        assert "sleeping until" in one(late)
        run = db.execute("select id::text from stepwell.runs order by id desc").fetchone()
        assert run is not None
        assert "sleep" in stepwell("runs", "show", run[0]).stdout

        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            metrics = response.read().decode()
        assert 'stepwell_runs_total{outcome="succeeded",workflow="welcome"} 1.0' in metrics
        assert 'stepwell_slots{state="free"} 400.0' in metrics
        assert "stepwell_claims_total 3.0" in metrics

        taken = command(
            ["worker", "x.py", "--metrics-port", str(port)], database_url=database_url, cwd=tmp_path
        )
        assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
        assert f"0.0.0.0:{port}" in taken.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not list(tmp_path.glob("stepwell-metrics-*"))
    assert "Traceback" not in (tmp_path / "worker.log").read_text()


def test_a_worker_that_cannot_start_says_why_in_a_sentence(
    database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.py").write_text("")
    for url, app, said in (
        (database_url, "nowhere.py", "there is no file nowhere.py"),
        (database_url, "empty.py", "defines no workflow"),
        (empty_database_url, "empty.py", "run `stepwell migrate`"),
    ):
        done = command(["worker", app, "--log-level", "error"], database_url=url, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_without_a_url_the_embedded_postgres_is_started_said_and_stopped(tmp_path: Path) -> None:
    home = Path("/var/tmp") / f"stepwell-tests-cli-{uuid.uuid4().hex[:8]}"
    variables = {**environment(""), "STEPWELL_DATA_DIR": str(home)}
    (tmp_path / "flows_embedded.py").write_text(FLOWS)

    def stepwell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "stepwell", *arguments],
            env=variables, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    server = embedded.Server(Settings(data_dir=home).data_dir, embedded.binaries(18))
    try:
        first = stepwell("enqueue", "welcome", LEAD, "--app", "flows_embedded.py")
        assert first.returncode == 0
        assert first.stderr.count("\n") == 1
        assert f"embedded Postgres in {home} (started for this command, schema installed)" in first.stderr
        assert server.pid is None
        listed = stepwell("runs", "list", "--json")
        assert [run["id"] for run in json.loads(listed.stdout)] == [first.stdout.strip()]
        assert "schema" not in listed.stderr
    finally:
        server.stop("immediate")
        subprocess.run(["rm", "-rf", str(home)], check=True)
