"""stepwell.fork, rewind and resolve: what becomes of the history, the signals and the children of a run."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from psycopg.errors import InvalidParameterValue, ObjectNotInPrerequisiteState

from tests.protocol import Held, Lab, Worker, meanwhile
from worker.engine.transitions import ChildRow, EndState, RecordRow
from worker.replay.records import Record, visible


def signal(held: Held, path: int, name: str, payload: str) -> RecordRow:
    row = held.record(path, value=json.dumps(payload), name=name)
    row.kind = "signal"
    return row


def ended(lab: Lab, *paths: int | tuple[int, ...], state: EndState = "failed", **enqueued: Any) -> UUID:
    """A run with completed steps at these paths that has ended."""
    (run,) = lab.enqueue(**enqueued)
    end(lab, lab.worker(), *paths, state=state)
    return run


def end(
    lab: Lab, worker: Worker, *paths: int | tuple[int, ...], state: EndState = "failed", failing: bool = False
) -> None:
    held = worker.take()
    steps = [held.record(*(p if isinstance(p, tuple) else (p,))) for p in paths]
    if failing:
        steps[-1].outcome, steps[-1].value, steps[-1].error = "failed", None, {"type": "E", "message": "no"}
    worker.apply(held, held.finish(*steps, state=state, family=True))


def fork(lab: Lab, run: UUID, *path: int, **more: Any) -> UUID:
    named = "".join(f", {name} => %({name})s" for name in more)
    row = lab.db.execute(
        f"select stepwell.fork(%(run)s, %(path)s{named})".encode(), {"run": run, "path": list(path), **more}
    ).fetchone()
    assert row is not None
    made: UUID = row[0]
    return made


def rewind(lab: Lab, run: UUID, *path: int) -> int | None:
    epoch: int | None = lab.one("select stepwell.rewind(%s, %s)", run, list(path))
    return epoch


def resolve(lab: Lab, run: UUID, *path: int, value: Any = None, error: Any = None) -> int | None:
    epoch: int | None = lab.one(
        "select stepwell.resolve(%s, %s, %s, %s)",
        run, list(path), None if value is None else json.dumps(value), None if error is None else json.dumps(error),
    )  # fmt: skip
    return epoch


def applying(lab: Lab, run: UUID) -> list[tuple[tuple[int, ...], int, str]]:
    """What a replay would be handed."""
    return [(each.path, each.n, each.outcome) for each in visible(recorded(lab, run))]


def recorded(lab: Lab, run: UUID) -> list[Record]:
    rows = lab.rows(
        "select path, n, kind, name, outcome, value::text, error, fingerprint, at, seq, epoch from stepwell.outbox"
        " where run_id = %s order by seq",
        run,
    )
    return [Record(tuple(row[0]), *row[1:]) for row in rows]


# -- fork ----------------------------------------------------------------------------------------------


def test_a_fork_has_what_happened_before_a_call_and_a_beginning_of_its_own(lab: Lab) -> None:
    (run,) = lab.enqueue(priority=3, tenant="t", lane="l", labels='{"a": "b"}', key="k")
    end(lab, lab.worker(), 1, 2, 3)
    before = lab.history(run)
    made = fork(lab, run, 3)
    assert lab.history(run) == before
    assert applying(lab, made) == [((1,), 0, "completed"), ((2,), 0, "completed")]
    assert lab.history(made)[-1] == (3, 1, [], 1, "fork")
    said = lab.one("select value from stepwell.outbox where run_id = %s and kind = 'epoch'", made)
    assert json.loads(said) == {"of": str(run), "from": [3]}
    row = lab.rows(
        "select workflow, priority, tenant, lane, labels, state, epoch, key_epoch, seed, key, parent_id, finished_at"
        " from stepwell.runs where id = %s",
        made,
    )
    assert row == [("w", 3, "t", "l", {"a": "b"}, "open", 1, 0, run, None, None, None)]
    held = lab.worker().take()
    assert (held.run, held.claim.epoch, held.claim.seq, held.claim.seed, held.claim.driven) == (
        made, 1, 3, run, -1,
    )  # fmt: skip
    assert held.claim.waited is not None
    assert held.claim.waited < 5
    assert fork(lab, made, 2) != made
    assert {row[0] for row in lab.rows("select seed from stepwell.runs where seed is not null")} == {run}


def test_a_fork_may_have_another_input_and_another_version(lab: Lab) -> None:
    run = ended(lab, 1)
    made = fork(lab, run, 1, input='{"x": 1}', version="2")
    assert applying(lab, made) == []
    assert lab.rows("select input, version from stepwell.runs where id = %s", made) == [('{"x": 1}', "2")]
    assert lab.one("select name from stepwell.tasks where run_id = %s", made) == "w@2"


@pytest.mark.parametrize("path", [(4,), (9,), (9, 1, 1), (9, 1), (0,), (1, 0)])
def test_a_run_is_forked_only_where_it_has_been(lab: Lab, path: tuple[int, ...]) -> None:
    run = ended(lab, 1, (2, 2, 1))
    refused = InvalidParameterValue if 0 in path else ObjectNotInPrerequisiteState
    with pytest.raises(refused, match="stepwell: "):
        fork(lab, run, *path)


@pytest.mark.parametrize(
    ("path", "kept"), [((), 0), ((1,), 0), ((2,), 1), ((2, 2), 1), ((2, 1, 1), 2), ((2, 2, 2), 2), ((3,), 2)]
)
def test_a_run_is_forked_from_calls_that_it_has_made_or_come_to(
    lab: Lab, path: tuple[int, ...], kept: int
) -> None:
    assert len(applying(lab, fork(lab, ended(lab, 1, (2, 2, 1)), *path))) == kept


def test_an_unknown_run_is_not_forked(lab: Lab) -> None:
    assert lab.one("select stepwell.fork(gen_random_uuid(), '{1}')") is None
    with pytest.raises(InvalidParameterValue, match="JSON object"):
        fork(lab, ended(lab, 1), 1, input="[]")


def test_a_run_that_is_being_executed_is_forked_as_it_is(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    worker.apply(held, held.move(held.record(1), doing=(2,)))
    made = fork(lab, run, 2)
    assert applying(lab, made) == [((1,), 0, "completed")]
    worker.apply(held, held.finish(held.record(2)))
    assert lab.state(run) == "succeeded"


def test_a_fork_leaves_out_what_was_undone_and_the_cancellation(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    cancelled = RecordRow((), 2, "cancel", "w", "cancelled", datetime.now(UTC))
    worker.apply(
        held,
        held.finish(held.record(1), held.record(2), cancelled, held.record(2, 0), held.record(1, 0), state="cancelled"),
    )  # fmt: skip
    assert applying(lab, fork(lab, run, 2)) == [((1,), 0, "completed")]
    assert applying(lab, fork(lab, run, 3)) == [((1,), 0, "completed"), ((2,), 0, "completed")]


def test_a_fork_of_a_run_that_began_anew_has_only_what_came_since(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    worker.apply(held, held.move(held.record(1), held.record(2)))
    task = held.task
    lab.db.execute("update stepwell.tasks set seq = seq + 1 where id = %s", [task])
    lab.db.execute(
        "insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, outcome, value)"
        " values (%s, 1, '{}', 1, 3, 'epoch', 'w', 'continue', '{}')",
        [run],
    )
    lab.db.execute(
        "update stepwell.runs set epoch = 1, base_epoch = 1, key_epoch = 1, seed = gen_random_uuid()"
    )
    worker.apply(held, held.release())
    again = worker.take()
    worker.apply(again, again.finish(again.record(1), state="failed"))
    with pytest.raises(ObjectNotInPrerequisiteState, match="has not come to call 3"):
        fork(lab, run, 3)
    made = fork(lab, run, 2)
    assert [row[1:3] for row in lab.history(made)] == [(1, []), (1, [1]), (2, [])]
    assert lab.rows("select base_epoch, key_epoch, epoch from stepwell.runs where id = %s", made) == [
        (1, 1, 2)
    ]


# -- rewind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "blocked"])
def test_a_run_that_has_ended_goes_on_from_a_call_before(lab: Lab, state: EndState) -> None:
    run = ended(lab, 1, 2, 3, state=state)
    assert rewind(lab, run, 2) == 1
    assert applying(lab, run) == [((1,), 0, "completed")]
    assert lab.rows("select state, epoch, key_epoch, finished_at, output, error from stepwell.runs") == [
        ("open", 1, 1, None, None, None)
    ]
    held = lab.worker().take()
    assert (held.claim.epoch, held.claim.key_epoch, held.claim.seq, held.claim.driven) == (1, 1, 5, -1)
    assert rewind(lab, run, 1) is None


def test_an_open_run_is_rewound_when_it_is_paused_and_nothing_of_it_is_executed(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    worker.apply(held, held.move(held.record(1), doing=(2,)))
    assert rewind(lab, run, 1) is None
    assert lab.one("select stepwell.pause(%s)", run)
    assert rewind(lab, run, 1) is None
    assert worker.flush(held.park(held.record(2), doing=(3,), delay=60.0)) == [1 + 8]
    assert rewind(lab, run, 1) == 1
    assert lab.state(run) == "waiting"
    assert worker.take().claim.seq == 3


def test_a_run_is_not_rewound_to_where_it_has_not_been(lab: Lab) -> None:
    run = ended(lab, 1, 2)
    for path in ((3,), (1, 1, 1), (2, 0)):
        refused = InvalidParameterValue if 0 in path else ObjectNotInPrerequisiteState
        with pytest.raises(refused, match="stepwell: "):
            rewind(lab, run, *path)
    assert lab.one("select stepwell.rewind(gen_random_uuid(), '{1}')") is None


def test_rewinds_go_by_what_applies(lab: Lab) -> None:
    run = ended(lab, 1, 2, 3)
    assert rewind(lab, run, 2) == 1
    end(lab, lab.worker(), 2)
    with pytest.raises(ObjectNotInPrerequisiteState, match="nothing recorded at 3"):
        rewind(lab, run, 3)
    assert rewind(lab, run, 1) == 2
    assert applying(lab, run) == []


def test_signals_that_were_taken_after_that_point_are_there_again_in_their_order(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    for payload in ("c", "d"):
        assert lab.one("select stepwell.signal(%s, 's', to_json(%s::text))", run, payload)
    for _ in range(2):
        worker.apply_wakes()
        held = worker.take()
        first = 1 if held.claim.epoch == 0 else 2
        taken = [signal(held, path, "s", value) for path, value in ((1, "z"), (2, "a"), (3, "b"))][
            first - 1 :
        ]
        worker.apply(held, held.finish(*taken, state="failed"))
        assert rewind(lab, run, 2) == held.claim.epoch + 1
        if held.claim.epoch == 0:
            assert [
                p for (p,) in lab.rows("select payload #>> '{}' from stepwell.signals order by id")
            ] == list("abcd")
            lab.db.execute("delete from stepwell.signals where id < 0")  # they are taken again
    assert [p for (p,) in lab.rows("select payload #>> '{}' from stepwell.signals order by id")] == list(
        "abcd"
    )
    assert lab.one("select signals from stepwell.tasks where run_id = %s and kind = 'run'", run) == 4


def child_of(lab: Lab, run: UUID, path: list[int], *, detached: bool = False) -> UUID:
    (child,) = lab.enqueue()
    lab.db.execute(
        "update stepwell.runs set parent_id = %s, parent_path = %s, detached = %s where id = %s",
        [run, path, detached, child],
    )
    return child


def test_children_made_after_that_point_are_on_their_own(lab: Lab) -> None:
    run = ended(lab, 1, (2, 1, 1), 3)
    before, after = child_of(lab, run, [1]), child_of(lab, run, [4])
    detached = child_of(lab, run, [5], detached=True)
    beside = child_of(lab, run, [2, 2, 1])
    lab.db.execute(
        "update stepwell.runs set created_at = created_at - interval '1 hour' where id = %s", [beside]
    )
    lab.db.execute(
        "insert into stepwell.signals (run_id, name, payload) values (%s, 'stepwell:child:4', 'null')", [run]
    )
    assert rewind(lab, run, 2, 1, 1) == 1
    paths = dict(lab.rows("select id, parent_path from stepwell.runs where parent_id = %s", run))
    assert paths == {before: [1], beside: [2, 2, 1], after: None, detached: None}
    assert lab.rows("select run_id from stepwell.tasks where kind = 'wake'") == [(after,)]
    assert lab.rows("select from stepwell.signals") == []


def test_a_run_whose_steps_were_undone_is_rewound_to_the_first_of_them_or_before(lab: Lab) -> None:
    run = ended(lab, 1, 2, 3, (3, 0), (2, 0))
    assert lab.retry(run) is None
    assert resolve(lab, run, 3, value=1) is None
    with pytest.raises(ObjectNotInPrerequisiteState, match=r"step at 2 was undone .* rewind to 2 or before"):
        rewind(lab, run, 3)
    assert rewind(lab, run, 2) == 1
    assert applying(lab, run) == [((1,), 0, "completed")]
    end(lab, lab.worker(), 2)
    assert lab.retry(run) == 2  # what was undone before the rewind is past


def test_a_run_that_is_blocked_by_a_failed_undo_is_retried(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    cancelled = RecordRow((), 2, "cancel", "w", "cancelled", datetime.now(UTC))
    failed = held.record(1, 0, outcome="failed", value=None)
    worker.apply(
        held,
        held.finish(held.record(1), held.record(2), cancelled, held.record(2, 0), failed, state="blocked"),
    )
    assert lab.retry(run) == 1
    assert [path for path, n, _ in applying(lab, run) if n == 0 or not path] == [(1,), (2,), (), (2, 0)]


def test_of_a_rewind_and_a_retry_at_once_one_opens_the_run(lab: Lab) -> None:
    run = ended(lab, 1)
    first, second = lab.connection(autocommit=False), lab.connection()
    assert lab.one("select stepwell.retry(%s)", run, db=first) == 1
    with meanwhile(lambda: lab.one("select stepwell.rewind(%s, '{1}')", run, db=second)) as answer:
        lab.wait_for_lock(second)
        first.commit()
    assert answer.result() is None
    assert lab.one("select count(*) from stepwell.tasks") == 1


# -- resolve -------------------------------------------------------------------------------------------


def held_step(lab: Lab, *, state: EndState = "blocked") -> UUID:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    interrupted = held.record(2, n=1, outcome="interrupted", value=None, name="charge", fingerprint=7)
    worker.apply(held, held.finish(held.record(1), interrupted, state=state))
    return run


def test_a_held_step_is_resolved_by_a_value_or_an_error(lab: Lab) -> None:
    for given in ({"value": {"paid": True}}, {"error": {"type": "Declined", "message": "no"}}):
        run = held_step(lab)
        assert resolve(lab, run, 2, **given) == 1
        row = lab.rows(
            "select seq, epoch, name, fingerprint, outcome, value, error from stepwell.outbox"
            " where run_id = %s and path = '{2}' and n = 0",
            run,
        )
        outcome = "completed" if "value" in given else "failed"
        assert row[0][:5] == (5, 1, "charge", 7, outcome)
        assert [None if each is None else json.loads(each) for each in row[0][5:]] == [
            given.get("value"), given.get("error"),
        ]  # fmt: skip
        assert applying(lab, run)[-1] == ((2,), 0, outcome)
        held = lab.worker().take()
        assert held.claim.seq == 5
        held_by = lab.worker()
        assert held_by.flush(held.move(held.record(3))) == [0]


def test_what_has_completed_or_was_got_past_or_never_began_is_not_resolved(lab: Lab) -> None:
    run = held_step(lab)
    for path, said in ((1, "has completed"), (3, "no execution")):
        with pytest.raises(ObjectNotInPrerequisiteState, match=said):
            resolve(lab, run, path, value=1)
    with pytest.raises(InvalidParameterValue, match="by a value or by an error"):
        resolve(lab, run, 2)
    with pytest.raises(InvalidParameterValue, match='"type" and "message"'):
        resolve(lab, run, 2, error="no")
    assert resolve(lab, run, 2, value=1) == 1
    assert resolve(lab, run, 2, value=1) is None

    (caught,) = lab.enqueue()
    lab.db.execute("delete from stepwell.tasks where run_id = %s", [run])
    worker = lab.worker()
    held = worker.take()
    failed = held.record(1, outcome="failed", value=None)
    worker.apply(held, held.finish(failed, held.record(2), state="failed"))
    with pytest.raises(ObjectNotInPrerequisiteState, match="has gone on since"):
        resolve(lab, caught, 1, value=1)


def block(lab: Lab, *records: tuple[int, int]) -> None:
    """Have the run that is ready blocked, with executions (path, n) that were interrupted."""
    worker = lab.worker()
    held = worker.take()
    rows = [held.record(path, n=n, outcome="interrupted", value=None) for path, n in records]
    worker.apply(held, held.finish(*rows, state="blocked"))


def test_what_was_said_of_a_step_can_be_said_otherwise_until_the_run_has_gone_on(lab: Lab) -> None:
    run = held_step(lab)
    for epoch, value in enumerate((17, "seventeen", {"n": 17}), 1):
        assert resolve(lab, run, 2, value=value) == epoch
        assert applying(lab, run) == [
            ((1,), 0, "completed"),
            ((2,), 1, "interrupted"),
            ((2,), 0, "completed"),
        ]
        assert visible(recorded(lab, run))[-1].value == json.dumps(value)
        assert lab.rows(
            "select value::text from stepwell.standing(%s) where path = '{2}' and n = 0", run
        ) == [(json.dumps(value),)]
        block(lab)
    opened = (
        "select outcome, value::text from stepwell.outbox where run_id = %s and kind = 'epoch' order by seq"
    )
    said = '{"at" : [2]}'
    assert lab.rows(opened, run) == [("retry", None), ("resolve", said), ("resolve", said)]
    assert resolve(lab, run, 2, error={"type": "Declined", "message": "no"}) == 4
    assert applying(lab, run)[-1] == ((2,), 0, "failed")
    block(lab)
    assert resolve(lab, run, 2, value="paid after all") == 5
    block(lab, (3, 1))
    with pytest.raises(ObjectNotInPrerequisiteState, match="has gone on since step charge at 2 was resolved"):
        resolve(lab, run, 2, value=1)


def test_what_was_said_of_a_step_stands_once_the_run_has_made_a_child(lab: Lab) -> None:
    run = held_step(lab)
    assert resolve(lab, run, 2, value=1) == 1
    block(lab)
    child_of(lab, run, [3])
    with pytest.raises(ObjectNotInPrerequisiteState, match="has gone on since"):
        resolve(lab, run, 2, value=2)


def test_a_step_that_a_worker_has_completed_is_not_resolved_in_a_later_epoch_either(lab: Lab) -> None:
    run = held_step(lab)
    assert resolve(lab, run, 2, value=1) == 1
    block(lab)
    with pytest.raises(ObjectNotInPrerequisiteState, match="step send at 1 has completed"):
        resolve(lab, run, 1, value=1)


def test_a_fork_and_a_retry_keep_what_was_said_last(lab: Lab) -> None:
    run = held_step(lab)
    assert resolve(lab, run, 2, value=1) == 1
    block(lab)
    assert resolve(lab, run, 2, value=2) == 2
    block(lab)
    assert lab.retry(run) == 3
    for each in (run, fork(lab, run, 3)):
        assert [record.value for record in visible(recorded(lab, each))][-1] == "2"


def test_a_failed_undo_is_resolved(lab: Lab) -> None:
    (run,) = lab.enqueue()
    worker = lab.worker()
    held = worker.take()
    failed = held.record(1, 0, outcome="failed", value=None)
    worker.apply(held, held.finish(held.record(1), held.record(2, outcome="failed"), failed, state="blocked"))
    assert resolve(lab, run, 1, 0, value="refunded by hand") == 1
    assert applying(lab, run)[-1] == ((1, 0), 0, "completed")


# -- children of a retried parent ----------------------------------------------------------------------


def parent_with_child(lab: Lab, worker: Worker, *child_steps: int | tuple[int, ...]) -> tuple[UUID, UUID]:
    """A failed parent, whose call at 1 made a child that has failed."""
    (run,) = lab.enqueue()
    held = worker.take()
    row = ChildRow(
        path=(1,), workflow="w", version="", queue="default", input=msgspec.Raw(b"{}"), counted=True
    )
    worker.apply(held, held.park(awaits=[], extras=[row]))
    end(lab, worker, *child_steps)
    (child,) = lab.rows("select id from stepwell.runs where parent_id = %s", run)[0]
    worker.apply_wakes()
    held = worker.take()
    failed = held.record(1, outcome="failed", value=None)
    failed.kind = "child"
    worker.apply(held, held.finish(failed, state="failed"))
    return run, child


def test_a_child_that_the_retried_parent_counts_wakes_it(lab: Lab) -> None:
    worker = lab.worker()
    run, child = parent_with_child(lab, worker, 1)
    assert lab.retry(run) == 1
    held = worker.take()
    row = ChildRow(
        path=(1,), workflow="w", version="", queue="default", input=msgspec.Raw(b"{}"), counted=True
    )
    worker.apply(held, held.park(awaits=[], extras=[row]))
    assert lab.task(held.task, "state, pending") == ("waiting", 1)
    end(lab, worker, 2, state="succeeded")
    worker.apply_wakes()
    assert lab.task(held.task, "state, pending") == ("ready", 0)
    assert lab.state(child) == "succeeded"


def test_a_child_that_has_undone_its_steps_begins_again_when_its_parent_is_retried(lab: Lab) -> None:
    worker = lab.worker()
    run, child = parent_with_child(lab, worker, 1, (1, 0))
    assert lab.retry(run) == 1
    held = worker.take()
    row = ChildRow(
        path=(1,), workflow="w", version="", queue="default", input=msgspec.Raw(b"{}"), counted=True
    )
    worker.apply(held, held.park(awaits=[], extras=[row]))
    assert lab.state(child) == "waiting"
    assert applying(lab, child) == []
    assert lab.one("select key_epoch from stepwell.runs where id = %s", child) == 1


# -- the two that say what applies ---------------------------------------------------------------------


def test_the_database_and_the_replay_agree_on_what_applies(lab: Lab) -> None:
    for number in range(60):
        drawn = random.Random(number)
        run: UUID = lab.one("select gen_random_uuid()")
        epoch = 0
        paths = [(1,), (2,), (3, 1, 1), (3, 2, 1), (3, 2, 2), (4,), (5,)]
        for seq in range(1, 25):
            kind, path, n, outcome, value = "step", drawn.choice(paths), seq, "failed", None
            match drawn.randrange(12):
                case 0:
                    epoch += 1
                    kind, path, n = "epoch", (), 1
                    outcome = drawn.choice(
                        ["retry", "retry", "resolve", "rewind", "rewind", "fork", "continue"]
                    )
                    told = {"rewind": "to", "resolve": "at"}.get(outcome)
                    value = json.dumps({told: drawn.choice(paths)}) if told else None
                case 1:
                    if lab.rows("select from stepwell.outbox where run_id = %s and epoch = %s and n = 2 and path = '{}'",
                                run, epoch):  # fmt: skip
                        continue
                    kind, path, n, outcome = "cancel", (), 2, "cancelled"
                case 2:
                    path = (*path, 0)
                case _:
                    pass
            lab.db.execute(
                "insert into stepwell.outbox (run_id, epoch, path, n, seq, kind, name, outcome, value)"
                " values (%s, %s, %s, %s, %s, %s, 'x', %s, %s)",
                [run, epoch, list(path), n, seq, kind, outcome, value],
            )
        said = [
            seq for (seq,) in lab.rows("select seq from stepwell.standing(%s) where kind <> 'epoch'", run)
        ]
        assert said == [record.seq for record in visible(recorded(lab, run))], number
