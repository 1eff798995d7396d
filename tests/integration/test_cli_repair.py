"""`stepwell runs retry`, `pause` and their like against a real database: one run, many, and what is asked before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from click.testing import CliRunner, Result

from outbox.codec import Signature
from tests.protocol import Lab, Worker
from worker.cli import main, repair
from worker.engine.transitions import EndState
from worker.registry import collecting

Command = Callable[..., Result]


@pytest.fixture
def stepwell(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `stepwell runs …` in this process, in an empty directory, with the test's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_DATABASE_URL", lab.url)

    def run(*arguments: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(main, arguments, input=input, catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def worker(lab: Lab) -> Worker:
    return lab.worker()


def run_of(
    lab: Lab, worker: Worker, state: EndState | None = "failed", *, steps: int = 2, last: str = "failed"
) -> str:
    """A run with steps that have completed and a last one that has not, in this state; None: it waits."""
    (run,) = lab.enqueue()
    held = worker.take()
    records = [held.record(path) for path in range(1, steps)]
    if state is not None:
        records.append(held.record(steps, n=int(last == "interrupted"), outcome=last, value=None))
    worker.apply(
        held, held.park(*records, delay=3600.0) if state is None else held.finish(*records, state=state)
    )
    return str(run)


def sentence(result: Result) -> str:
    """Return the one sentence that a mistake is told in."""
    assert result.stdout == ""
    assert result.stderr.startswith("stepwell: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# -- one run -------------------------------------------------------------------------------------------


def test_a_run_is_forked(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run = run_of(lab, worker)
    made = stepwell("runs", "fork", run[:30], "--from", "2")
    assert made.exit_code == 0
    assert lab.state(UUID(made.stdout.strip())) == "waiting"
    another = ("--input", '{"x": 1}', "--version", "7", "--allow-unknown")
    other = stepwell("runs", "fork", run, "--from", "2", *another, "--json")
    told = json.loads(other.stdout)
    assert told["of"] == run
    assert lab.rows("select version, input #>> '{x}' from stepwell.runs where id = %s", told["id"]) == [
        ("7", "1")
    ]
    missing = stepwell("runs", "fork", run, "--from", "9")
    assert missing.exit_code == 1
    assert "has not come to call 9" in sentence(missing)
    assert "not the path of a call" in sentence(stepwell("runs", "fork", run, "--from", "x"))
    assert "must be an object" in sentence(stepwell("runs", "fork", run, "--from", "2", "--input", "[1]"))
    assert "not valid JSON" in sentence(stepwell("runs", "fork", run, "--from", "2", "--input", "{"))


def test_a_run_is_rewound(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run = run_of(lab, worker)
    done = stepwell("runs", "rewind", run, "--to", "1")
    assert (done.exit_code, done.stdout) == (0, f"{run} goes on from 1\n")
    again = stepwell("runs", "rewind", run, "--to", "1")
    assert again.exit_code == 1
    assert f"pause it first (`stepwell runs pause {run}`)" in sentence(again)
    assert stepwell("runs", "pause", run).exit_code == 0
    lab.db.execute("update stepwell.outbox set n = 0 where kind = 'step'")
    beyond = stepwell("runs", "rewind", run, "--to", "5", "--json")
    assert beyond.exit_code == 1
    assert "nothing recorded at" in sentence(beyond)
    assert stepwell("runs", "rewind", run, "--to", "x").exit_code == 2


def test_a_step_is_resolved(lab: Lab, stepwell: Command, worker: Worker) -> None:
    first, second = (run_of(lab, worker, "blocked", last="interrupted") for _ in range(2))
    done = stepwell("runs", "resolve", first, "2", "--value", '{"paid": true}')
    assert (done.exit_code, done.stdout) == (0, f"{first} goes on, with 2 completed\n")
    failed = stepwell("runs", "resolve", second, "2", "--error", "declined", "--json")
    assert json.loads(failed.stdout) == {"id": second, "epoch": 1}
    rows = lab.rows("select value, error from stepwell.outbox where path = '{2}' and n = 0 order by outcome")
    assert [[None if each is None else json.loads(each) for each in row] for row in rows] == [
        [{"paid": True}, None],
        [None, {"type": "Resolved", "message": "declined"}],
    ]
    assert "how has the step ended?" in sentence(stepwell("runs", "resolve", first, "2"))
    assert "how has the step ended?" in sentence(
        stepwell("runs", "resolve", first, "2", "--value", "1", "--error", "x")
    )
    assert "a text is written in quotes" in sentence(
        stepwell("runs", "resolve", first, "2", "--value", "paid")
    )
    conflict = stepwell("runs", "resolve", first, "2", "--value", "1")
    assert conflict.exit_code == 1
    assert "is open" in sentence(conflict)
    lab.db.execute("delete from stepwell.tasks")
    third = run_of(lab, worker, "blocked", last="interrupted")
    completed = stepwell("runs", "resolve", third, "1", "--value", "1")
    assert completed.exit_code == 1
    assert "step send at 1 has completed (rewind to it to have it executed again)" in sentence(completed)
    assert stepwell("runs", "resolve", third, "7", "--value", "1").exit_code == 1


STEPS = """
from worker import step, workflow

def refund(total: int, result: int) -> bool: ...

@step(name="send", undo=refund)
async def total_of(total: int) -> int: ...

@workflow
async def sums() -> None: ...
"""


def test_a_value_that_is_said_of_a_step_is_checked_by_an_app(
    lab: Lab, stepwell: Command, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "resolved_steps.py").write_text(STEPS)
    (tmp_path / "without_steps.py").write_text(STEPS.replace('name="send"', 'name="other"'))
    with collecting():
        run = run_of(lab, worker, "blocked", last="interrupted")
        resolve = ("runs", "resolve", run, "2", "--app", "resolved_steps.py", "--value")
        refused = stepwell(*resolve, '"seventeen"')
        assert refused.exit_code == 2
        assert "the value of step 'send': expected `int`, got `str`" in sentence(refused)
        assert stepwell(*resolve, "17").exit_code == 0
    with collecting():
        missing = stepwell("runs", "resolve", run, "2", "--app", "without_steps.py", "--value", "17")
        assert missing.exit_code == 2
        assert "without_steps.py defines no step called 'send'" in sentence(missing)


def test_a_value_of_the_wrong_type_can_be_given_anew(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run = run_of(lab, worker, "blocked", last="interrupted")
    assert stepwell("runs", "resolve", run, "2", "--value", "17").exit_code == 0
    held = worker.take()
    worker.apply(held, held.finish(state="blocked"))
    assert stepwell("runs", "resolve", run, "2", "--value", '"seventeen"').exit_code == 0
    shown = stepwell("runs", "show", run).stdout
    assert "resolved anew 1×" in shown
    assert "what was said of call 2 before does not count" in " ".join(shown.split())


def test_a_run_is_paused_shown_and_resumed(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run = run_of(lab, worker, None)
    assert stepwell("runs", "pause", run).stdout == f"{run} is paused\n"
    assert run in stepwell("runs", "list", "--status", "paused", "--json").stdout
    shown = stepwell("runs", "show", run)
    assert "paused" in shown.stdout
    assert "stepwell runs resume" in shown.stdout.replace("\n", " ")
    assert json.loads(stepwell("runs", "resume", run, "--json").stdout) == [
        {"id": run, "paused": False, "error": None}
    ]
    again = stepwell("runs", "resume", run)
    assert again.exit_code == 1
    assert "is not paused" in sentence(again)
    lab.db.execute("delete from stepwell.tasks")
    assert "is not open" in sentence(stepwell("runs", "pause", run_of(lab, worker)))


def test_a_run_that_has_undone_its_steps_says_where_to_rewind_it_to(
    lab: Lab, stepwell: Command, worker: Worker
) -> None:
    (run,) = lab.enqueue()
    held = worker.take()
    worker.apply(held, held.finish(held.record(1), held.record(1, 0), state="failed"))
    refused = stepwell("runs", "retry", str(run))
    assert refused.exit_code == 1
    assert f"`stepwell runs rewind {run} --to 1`" in sentence(refused)


# -- many ----------------------------------------------------------------------------------------------


def test_many_are_counted_shown_and_asked_for(
    lab: Lab, stepwell: Command, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of(lab, worker) for _ in range(7)]
    spared = run_of(lab, worker, "blocked")
    unasked = stepwell("runs", "retry", "--status", "failed")
    assert unasked.exit_code == 2
    assert "no terminal to ask at: pass --yes" in unasked.stderr
    monkeypatch.setattr(repair, "is_terminal", lambda: True)
    refused = stepwell("runs", "retry", "--status", "failed", input="n\n")
    assert refused.exit_code == 1
    lines = refused.stderr.splitlines()
    assert lines[0] == "7 runs to retry:"
    assert [line.split()[0] for line in lines[1:6]] == runs[:5]
    assert lines[1].endswith("w  failed  E: it ended")
    assert lines[6] == "  … and 2 more"
    assert refused.stderr.endswith("nothing was changed\n")
    assert lab.one("select count(*) from stepwell.tasks") == 0

    done = stepwell("runs", "retry", "--status", "failed", input="y\n")
    assert (done.exit_code, done.stdout) == (0, "7 runs ready again\n")
    assert lab.one("select count(*) from stepwell.tasks") == 7
    assert lab.state(UUID(spared)) == "blocked"
    nothing = stepwell("runs", "retry", "--status", "failed")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr) == (0, "", "0 runs to retry\n")


def test_a_dry_run_changes_nothing(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run = run_of(lab, worker)
    done = stepwell("runs", "retry", "--workflow", "w", "--dry-run")
    assert done.exit_code == 0
    assert done.stderr.startswith(f"1 run to retry:\n  {run}  w  failed")
    told = stepwell("runs", "retry", "--since", "1h", "--error-like", "it ended", "--dry-run", "--json")
    assert json.loads(told.stdout) == {"matching": 1, "changed": 0, "examples": [run], "dry_run": True}
    assert told.stderr == ""
    assert lab.state(UUID(run)) == "failed"


def test_a_status_may_be_called_a_state(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run = run_of(lab, worker)
    chosen = ("--workflow", "w", "--state", "failed", "--error-like", "it ended", "--since", "1h")
    done = stepwell("runs", "retry", *chosen, "--yes")
    assert (done.exit_code, done.stdout) == (0, "1 run ready again\n")
    assert lab.state(UUID(run)) == "waiting"


def test_runs_are_listed_by_the_same_options(lab: Lab, stepwell: Command, worker: Worker) -> None:
    failed = [run_of(lab, worker) for _ in range(3)]
    run_of(lab, worker, "blocked")
    lab.enqueue()

    def listed(*options: str) -> list[str]:
        done = stepwell("runs", "list", "--json", *options)
        assert done.exit_code == 0
        return [each["id"] for each in json.loads(done.stdout)]

    assert listed("--status", "failed") == listed("--state", "failed") == failed[::-1]
    assert listed("--error-like", "IT ENDED", "--state", "failed", "--limit", "2") == failed[:0:-1]
    assert listed("--error-like", "nothing of the kind") == []
    assert len(listed("--since", "1h")) == 5
    lab.db.execute("select pg_sleep(0.05)")
    assert listed("--since", "10ms", "--workflow", "w") == []


def test_only_what_can_be_changed_is_meant(lab: Lab, stepwell: Command, worker: Worker) -> None:
    failed, waiting = run_of(lab, worker), run_of(lab, worker, None)
    paused = stepwell("runs", "pause", "--workflow", "w", "--yes", "--json")
    assert json.loads(paused.stdout) == {"matching": 1, "changed": 1, "examples": [waiting], "dry_run": False}
    resumed = stepwell("runs", "resume", "--workflow", "w", "--yes")
    assert resumed.stdout == "1 run resumed\n"
    assert stepwell("runs", "retry", "--since", "1h", "--yes").stdout == "1 run ready again\n"
    assert stepwell("runs", "cancel", "--since", "1h", "--yes").stdout == "2 runs asked to end\n"
    worker.apply_wakes()
    assert lab.state(UUID(failed)) == "waiting"
    wrong = stepwell("runs", "resume", "--status", "failed", "--yes")
    assert wrong.exit_code == 2


def test_what_could_not_be_changed_is_told(lab: Lab, stepwell: Command, worker: Worker) -> None:
    run_of(lab, worker)
    lab.enqueue()
    held = worker.take()
    worker.apply(held, held.finish(held.record(1), held.record(1, 0), state="failed"))
    done = stepwell("runs", "retry", "--workflow", "w", "--yes")
    assert done.stdout == "1 run ready again; 1 could not be, or not any more\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retry"], "which runs to retry?"),
        (["pause", "--yes"], "which runs to pause?"),
        (["retry", "0123", "--workflow", "w"], "not both"),
        (["retry", "0123", "--yes"], "not both"),
        (["cancel", "0123", "--dry-run"], "not both"),
    ],
)
def test_mistakes_are_told_in_a_sentence(stepwell: Command, arguments: list[str], said: str) -> None:
    done = stepwell("runs", *arguments)
    assert done.exit_code == 2
    assert said in sentence(done)


# -- enqueue for a version -----------------------------------------------------------------------------


def of_old(old: int) -> None: ...


def of_new(new: int) -> None: ...


@pytest.fixture
def published(lab: Lab) -> None:
    for version, function in (("1", of_old), ("2", of_new)):
        schema = json.dumps(Signature.of(function).json_schema())
        lab.db.execute("insert into stepwell.workflows values ('flow', %s, %s, 'q')", [version, schema])


APP = """
from worker import workflow

@workflow(name="flow", version="1")
async def old(old: int) -> None: ...

@workflow(name="flow", version="2")
async def new(new: int) -> None: ...

@workflow(version="5")
async def single() -> None: ...
"""


@pytest.mark.usefixtures("published")
def test_a_run_is_enqueued_for_a_version_and_checked_by_it(lab: Lab, stepwell: Command) -> None:
    for given, version in ((["--version", "1", '{"old": 1}'], "1"), (['{"new": 1}'], "2")):
        done = stepwell("enqueue", "flow", *given)
        assert done.exit_code == 0, done.stderr
        assert (
            lab.one("select version from stepwell.runs where id = %s", UUID(done.stdout.strip())) == version
        )
    wrong = stepwell("enqueue", "flow", '{"new": 1}', "--version", "1")
    assert wrong.exit_code == 2
    missing = stepwell("enqueue", "flow", '{"new": 1}', "--version", "3")
    assert missing.exit_code == 2
    assert "there is no version '3' of workflow 'flow'; workers have published '1', '2'" in sentence(missing)
    assert stepwell("enqueue", "flow", '{"x": 1}', "--version", "3", "--allow-unknown").exit_code == 0


@pytest.mark.usefixtures("published")
def test_a_fork_is_checked_as_a_new_run_is(lab: Lab, stepwell: Command, tmp_path: Path) -> None:
    made = stepwell("enqueue", "flow", '{"old": 1}', "--version", "1", "--queue", "default")
    run = made.stdout.strip()
    fork = ("runs", "fork", run, "--from", "1")
    for given, said in (
        (["--input", '{"nope": 1}'], "input of workflow 'flow'"),
        (["--input", '{"new": 1}'], "input of workflow 'flow'"),
        (["--version", "2"], f"the input of run {run}"),
        (["--version", "7"], "there is no version '7' of workflow 'flow'; workers have published '1', '2'"),
        (["--version", "7", "--app", "none.py"], "there is no file none.py"),
    ):
        refused = stepwell(*fork, *given)
        assert refused.exit_code == 2, given
        assert said in sentence(refused)
    assert lab.one("select count(*) from stepwell.runs") == 1
    for given in (
        [],
        ["--input", '{"old": 2}'],
        ["--input", '{"new": 2}', "--version", "2"],
        ["--version", "7", "--allow-unknown"],
    ):
        done = stepwell(*fork, *given)
        assert done.exit_code == 0, done.stderr
    (tmp_path / "forked_flows.py").write_text(APP.replace('version="5"', 'version="6"'))
    with collecting():
        assert stepwell(*fork, "--version", "2", "--app", "forked_flows.py").exit_code == 2


def test_an_app_with_several_versions_is_asked_for_one(
    lab: Lab, stepwell: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "versioned_flows.py").write_text(APP)
    several = stepwell("enqueue", "flow", '{"old": 1}', "--app", "versioned_flows.py")
    assert several.exit_code == 2
    assert "give one of '1', '2' by --version" in sentence(several)
    for name, given, version in (("flow", ['{"old": 1}', "--version", "1"], "1"), ("single", [], "5")):
        done = stepwell("enqueue", name, *given, "--app", "versioned_flows.py")
        assert done.exit_code == 0, done.stderr
        assert (
            lab.one("select version from stepwell.runs where id = %s", UUID(done.stdout.strip())) == version
        )
