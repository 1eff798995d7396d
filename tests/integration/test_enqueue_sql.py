"""The public SQL functions, as any language calls them: inside the caller's own transaction, with nothing but psql."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow

from outbox.database import connect
from tests import postgres
from tests.claimant import Claimant
from tests.pooler import direct
from tests.postgres import Cluster
from tests.waiting import wait_until

Db = psycopg.Connection[TupleRow]

LEAD = '{"lead": {"id": 17, "name": "Ada"}}'
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NO_TRACES = (
    "",
    TRACE.upper(),
    TRACE + "-more",
    TRACE + "\n",
    f"{TRACE} {'v' * 513}",
    TRACE.replace("00-", "ff-", 1),
    f"00-{'0' * 32}-b7ad6b7169203331-01",
    f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
)


def one(db: Db, statement: str, *parameters: Any) -> Any:
    row = db.execute(statement.encode(), parameters or None).fetchone()
    assert row is not None
    return row[0]


def counts(db: Db) -> tuple[int, ...]:
    """Return how many runs, tasks and keys there are."""
    return tuple(one(db, f"select count(*) from stepwell.{table}") for table in ("runs", "tasks", "keys"))


def enqueue_many(db: Db, inputs: list[str], keys: list[str | None] | None = None) -> list[tuple[Any, bool]]:
    return [
        (run, created)
        for run, created in db.execute(
            "select id, created from stepwell.enqueue_many('w', %s::text[]::json[], keys => %s)",
            [inputs, keys],
        )
    ]


# -- psql and nothing else ---------------------------------------------------------------------------


@pytest.fixture
def psql(cluster: Cluster, database_url: str) -> Any:
    program = postgres.binaries(cluster.version) / "psql"
    if not Path(program).exists():
        pytest.skip("this Postgres comes without psql")

    def run(script: str) -> str:
        done = subprocess.run(
            [program, "-XAtq", "-v", "ON_ERROR_STOP=1", database_url],
            input=script, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_psql_enqueues_with_a_business_row(psql: Any, db: Db) -> None:
    db.execute("create table leads (id int primary key)")
    run = psql(
        f"""
        begin;
        insert into leads values (17);
        select stepwell.enqueue('welcome_lead', '{LEAD}', key => '17');
        commit;
        """
    ).strip()
    assert str(one(db, "select id from stepwell.runs where workflow = 'welcome_lead'")) == run
    assert counts(db) == (1, 1, 1)
    assert one(db, "select count(*) from leads") == 1


def test_a_rollback_in_psql_leaves_nothing(psql: Any, db: Db) -> None:
    db.execute("create table leads (id int primary key)")
    psql(
        f"""
        begin;
        insert into leads values (17);
        select stepwell.enqueue('welcome_lead', '{LEAD}', key => '17');
        rollback;
        """
    )
    assert counts(db) == (0, 0, 0)
    assert one(db, "select count(*) from leads") == 0


def test_a_business_row_that_fails_takes_the_run_along(db: Db) -> None:
    db.execute("create table leads (id int primary key)")
    db.execute("begin")
    db.execute("select stepwell.enqueue('welcome_lead', %s)", [LEAD])
    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute("insert into leads values (17), (17)")
    db.execute("commit")  # which rolls back
    assert counts(db) == (0, 0, 0)


# -- enqueue -----------------------------------------------------------------------------------------


def test_the_input_is_kept_character_for_character(db: Db) -> None:
    text = '{"z": 1e16,  "a": "\\u00e9", "a": 2.50}'
    run = one(db, "select stepwell.enqueue('w', %s)", text)
    assert one(db, "select input::text from stepwell.runs where id = %s", run) == text


def test_everything_but_the_name_has_a_default(db: Db) -> None:
    run = one(db, "select stepwell.enqueue('w')")
    row = db.execute(
        "select workflow, version, queue, priority, tenant, lane, labels, input::text, deadline_at, state"
        " from stepwell.runs where id = %s",
        [run],
    ).fetchone()
    assert row == ("w", "", "default", 5, None, None, None, "{}", None, "open")
    assert one(db, "select status from stepwell.run_status where id = %s", run) == "pending"


def test_all_options_are_kept(db: Db) -> None:
    run = one(
        db,
        """select stepwell.enqueue('w', '{}', key => 'k', queue => 'mail', priority => 0, delay => '1 hour',
                                   lane => 'l', tenant => 't', labels => '{"a": 1}', deadline => '2 hours')""",
    )
    row = db.execute(
        "select r.queue, r.priority, r.lane, r.tenant, r.labels, t.queue, t.priority, t.lane, t.tenant, t.state,"
        " round(extract(epoch from t.due_at - r.created_at)), round(extract(epoch from r.deadline_at - r.created_at))"
        " from stepwell.runs r join stepwell.tasks t on t.run_id = r.id where r.id = %s",
        [run],
    ).fetchone()
    assert row == ("mail", 0, "l", "t", {"a": 1}, "mail", 0, "l", "t", "waiting", 3600, 7200)


def test_ids_grow_with_time(db: Db) -> None:
    first = one(db, "select stepwell.enqueue('w')")
    db.execute("select pg_sleep(0.002)")
    assert one(db, "select stepwell.enqueue('w')") > first
    assert first.version == 7
    assert first.variant == "specified in RFC 4122"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("enqueue(null)", "workflow name"),
        ("enqueue('')", "workflow name"),
        ("enqueue(repeat('é', 128))", "workflow name"),
        ("enqueue('w', queue => '')", "queue name"),
        ("enqueue('w', queue => 'stepwell')", "queue name"),
        ("enqueue('w', priority => 10)", "priority must be 0"),
        ("enqueue('w', priority => -1)", "priority must be 0"),
        ("enqueue('w', priority => null)", "priority must be 0"),
        ("enqueue('w', delay => '1 s', at => now())", "delay or at"),
        ("enqueue('w', '[1]')", "must be a JSON object"),
        ("enqueue('w', 'null')", "must be a JSON object"),
        ("enqueue('w', null)", "must be a JSON object"),
        ("enqueue('w', key => repeat('é', 257))", "more than 512 bytes"),
        ("enqueue_many('w', array['{}', '{}']::json[], keys => array['k'])", "2 inputs but 1 keys"),
        *((f"enqueue('w', trace => '{text}')", "trace must be a W3C traceparent") for text in NO_TRACES),
        *((f"signal(stepwell.new_id(), 'go', trace => '{text}')", "trace must be") for text in NO_TRACES[:2]),
    ],
)
def test_an_argument_that_cannot_be_is_refused_in_one_sentence(db: Db, call: str, said: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=said) as refused:
        db.execute(f"select stepwell.{call}".encode())
    assert str(refused.value).startswith("stepwell: ")
    assert counts(db) == (0, 0, 0)


@pytest.mark.parametrize("trace", [TRACE, f"{TRACE} {'v' * 512}", TRACE.replace("00-", "cc-", 1)])
def test_the_context_of_a_trace_stays_with_the_run_and_its_forks(db: Db, trace: str) -> None:
    run = one(db, "select stepwell.enqueue('w', key => 'k', trace => %s)", trace)
    assert one(db, "select stepwell.enqueue('w', key => 'k', trace => %s)", TRACE) == run
    many = one(db, "select id from stepwell.enqueue_many('w', array['{}']::json[], trace => %s)", trace)
    forked = one(db, "select stepwell.fork(%s, '{1}')", run)
    rows = db.execute("select id, trace from stepwell.runs").fetchall()
    assert dict(rows) == {run: trace, many: trace, forked: trace}
    worker = Claimant(db, ("w",))
    worker.end(worker.claim(), "failed")
    assert one(db, "select stepwell.retry(id) from stepwell.runs where state = 'failed'") is not None
    assert one(db, "select count(distinct trace) from stepwell.runs") == 1


def test_the_context_of_a_trace_stays_with_the_signal(db: Db) -> None:
    run = one(db, "select stepwell.enqueue('w')")
    assert one(db, "select stepwell.signal(%s, 'go', '1', %s)", run, TRACE)
    assert one(db, "select stepwell.signal(%s, 'go')", run)
    assert db.execute("select trace from stepwell.signals order by id").fetchall() == [(TRACE,), (None,)]


def test_malformed_json_is_refused(db: Db) -> None:
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        db.execute("select stepwell.enqueue('w', '{\"lead\": ')")


def test_a_key_of_512_bytes_is_kept(db: Db) -> None:
    one(db, "select stepwell.enqueue('w', key => repeat('é', 256))")
    assert counts(db) == (1, 1, 1)


def test_a_key_belongs_to_its_workflow(db: Db) -> None:
    first = one(db, "select stepwell.enqueue('w', key => 'k')")
    assert one(db, "select stepwell.enqueue('v', key => 'k')") != first
    assert one(db, "select stepwell.enqueue('w', '{\"other\": 1}', key => 'k')") == first
    assert one(db, "select input::text from stepwell.runs where id = %s", first) == "{}"


def test_a_time_that_has_passed_is_now(db: Db) -> None:
    run = one(db, "select stepwell.enqueue('w', at => now() - interval '1 day')")
    assert one(db, "select state from stepwell.tasks where run_id = %s", run) == "ready"


# -- enqueue_many ------------------------------------------------------------------------------------


def test_many_answers_in_the_order_of_the_inputs(db: Db) -> None:
    inputs = [json.dumps({"n": n}) for n in range(500)]
    answers = enqueue_many(db, inputs, [str(999 - n) for n in range(500)])
    stored: dict[Any, str] = dict(db.execute("select id, input::text from stepwell.runs").fetchall())
    assert [stored[run] for run, _ in answers] == inputs
    turns = db.execute(
        "select r.input->>'n' from stepwell.tasks t join stepwell.runs r on r.id = t.run_id order by turn"
    )
    assert [int(n) for (n,) in turns] == list(range(500))


def test_of_a_key_given_twice_the_first_input_counts(db: Db) -> None:
    answers = enqueue_many(db, [f'{{"n": {n}}}' for n in range(1000)], [str(n // 4) for n in range(1000)])
    assert [created for _, created in answers] == [n % 4 == 0 for n in range(1000)]
    assert len({run for run, _ in answers}) == 250
    assert one(db, "select bool_and((input->>'n')::int % 4 = 0) from stepwell.runs")


def test_known_and_missing_keys_may_be_mixed(db: Db) -> None:
    known = one(db, "select stepwell.enqueue('w', key => 'b')")
    answers = enqueue_many(db, ["{}"] * 4, ["a", "b", None, None])
    assert [created for _, created in answers] == [True, False, True, True]
    assert answers[1][0] == known
    assert counts(db) == (4, 4, 2)


def test_nothing_is_enqueued_for_nothing(db: Db) -> None:
    assert enqueue_many(db, []) == []
    assert db.execute("select * from stepwell.enqueue_many('w', null)").fetchall() == []


def test_two_callers_with_the_same_keys_in_opposite_order_do_not_deadlock(database_url: str, db: Db) -> None:
    keys = [str(n) for n in range(200)]
    ready = threading.Barrier(2)
    answers: list[list[tuple[Any, bool]]] = []

    def call(ordered: list[str]) -> None:
        with connect(database_url, application_name="producer") as mine:
            for number in range(10):
                ready.wait(10)
                answers.append(enqueue_many(mine, ["{}"] * 200, [f"{number}.{key}" for key in ordered]))

    threads = [threading.Thread(target=call, args=(order,)) for order in (keys, keys[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 20
    assert counts(db) == (2000, 2000, 2000)
    assert sum(created for answer in answers for _, created in answer) == 2000


# -- producers and claimants do not meet (I15, I1) ---------------------------------------------------


def test_an_open_cancel_does_not_hold_up_the_worker(database_url: str, db: Db) -> None:
    run = one(db, "select stepwell.enqueue('w')")
    worker = Claimant(db, ("w",))
    claim = worker.claim()
    with connect(database_url, application_name="producer", autocommit=False) as producer:
        assert one(producer, "select stepwell.cancel(%s)", run)
        one(producer, "select stepwell.enqueue('w')")
        db.execute("set statement_timeout = '5s'")
        assert worker.flush(claim, "move", worker.record([0], 0, "completed"), doing=[1]) == 1
        worker.succeed(claim)
    assert one(db, "select status from stepwell.run_status where id = %s", run) == "succeeded"


def test_cancel_answers_whether_the_run_was_open(db: Db) -> None:
    run = one(db, "select stepwell.enqueue('w')")
    assert one(db, "select stepwell.cancel(%s)", run)
    worker = Claimant(db, ("w",))
    worker.succeed(worker.claim())
    assert not one(db, "select stepwell.cancel(%s)", run)
    assert not one(db, "select stepwell.cancel(gen_random_uuid())")


def test_a_busy_system_sends_no_notify(database_url: str, db: Db) -> None:
    with connect(direct(database_url), application_name="listener") as listener:
        listener.execute("listen stepwell")
        one(db, "select stepwell.enqueue('w')")
        db.execute("insert into stepwell.doorbell values (1, 'mail', now() + interval '1 hour')")
        one(db, "select stepwell.enqueue('w', queue => 'other')")
        one(db, "select stepwell.enqueue('w', queue => 'mail')")
        heard: list[str] = []

        def rung() -> bool:
            heard.extend(note.payload for note in listener.notifies(timeout=0, stop_after=1))
            listener.execute("select 1")
            return bool(heard)

        wait_until(rung)
        assert heard == ["mail"]


def test_without_a_queue_a_run_goes_where_the_workers_publish_its_workflow(db: Db) -> None:
    db.execute(
        "insert into stepwell.workflows (name, version, input_schema, queue) values ('w', '', '{}', 'leads')"
    )
    db.execute(
        "select stepwell.enqueue('w'), stepwell.enqueue('w', queue => 'own'), stepwell.enqueue('other')"
    )
    rows = db.execute("select workflow, queue from stepwell.runs order by 1, 2").fetchall()
    assert rows == [("other", "default"), ("w", "leads"), ("w", "own")]
