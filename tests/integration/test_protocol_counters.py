"""The totals: counted with what they count, exact whoever flushes at once, and no cause of a deadlock."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from tests.protocol import ALREADY, APPLIED, Db, Held, Lab, Worker, meanwhile

SHARDS = 64


def totals(lab: Lab) -> dict[tuple[str, str, str], int]:
    rows = lab.rows("select kind, name, outcome, sum(value)::int from stepwell.counters group by 1, 2, 3")
    return {(kind, name, outcome): total for kind, name, outcome, total in rows}


def recorded(lab: Lab) -> dict[tuple[str, str, str], int]:
    rows = lab.rows(
        "select kind, name, outcome, count(*)::int from stepwell.outbox where kind in ('run', 'step') group by 1, 2, 3"
    )
    return {(kind, name, outcome): total for kind, name, outcome, total in rows}


def test_what_is_counted_is_what_is_recorded(lab: Lab) -> None:
    lab.enqueue(4)
    worker = lab.worker()
    one, two, stale, waiting = worker.claim(4)
    stale.attempt += 1
    records = [
        one.record(1),
        one.record(2, n=1, outcome="failed", value=None),
        one.record(2, n=2, outcome="interrupted"),
    ]
    finish = two.finish(two.record(1, name="other"))
    worker.flush(one.move(*records, doing=(2,)), finish, stale.finish(stale.record(1)))
    assert worker.flush(finish) == [ALREADY]
    worker.apply(waiting, waiting.park(delay=3600.0))
    (unclaimed,) = lab.enqueue()
    assert lab.cancel(unclaimed)
    worker.apply_wakes()
    sleep = stale.record(1, name="sleep")
    sleep.kind = "sleep"
    stale.attempt -= 1
    worker.apply(stale, stale.move(sleep))
    assert totals(lab) == recorded(lab)
    assert totals(lab) == {
        ("step", "send", "completed"): 1,
        ("step", "send", "failed"): 1,
        ("step", "send", "interrupted"): 1,
        ("step", "other", "completed"): 1,
        ("run", "w", "succeeded"): 1,
        ("run", "w", "cancelled"): 1,
    }


def test_they_are_exact_when_many_connections_flush_at_once(lab: Lab) -> None:
    names = ("a", "b", "c")
    for name in names:
        lab.enqueue(60, name)
    connections = [*colliding(lab), lab.connection(), lab.connection()]
    workers = [lab.worker(*names, db=db) for db in connections]
    with ThreadPoolExecutor(len(workers)) as pool:
        done = [pool.submit(work, worker, random.Random(worker.id)) for worker in workers]
    assert sum(each.result() for each in done) == 180
    assert totals(lab) == recorded(lab)
    assert sum(total for (kind, _, _), total in totals(lab).items() if kind == "run") == 180


def work(worker: Worker, chance: random.Random) -> int:
    """Execute runs in batches, in an order of its own, until there are none; return how many."""
    ended = 0
    while held := worker.claim(8):
        chance.shuffle(held)
        moves = [
            each.move(*(each.record(step, name=f"step {chance.randrange(5)}") for step in range(3)))
            for each in held
        ]
        assert worker.flush(*moves) == [APPLIED] * len(held)
        for each in held:
            each.position += 1
        ends = [each.finish(state=chance.choice(("succeeded", "failed", "cancelled"))) for each in held]
        assert worker.flush(*ends) == [APPLIED] * len(held)
        ended += len(held)
    return ended


def test_a_flush_that_ends_runs_in_two_ways_does_not_deadlock_with_another(lab: Lab) -> None:
    """Both count in the same shard: each ends a claimed run of one name, and by a wake an idle one of the other's."""
    first, second = (lab.worker("a", "b", db=db) for db in colliding(lab))
    (a, b), (idle_a, idle_b) = [lab.enqueue(1, name)[0] for name in "ab"], [
        lab.enqueue(1, name, priority=9)[0] for name in "ab"
    ]  # fmt: skip
    held = {each.run: each for each in first.claim(2)}
    held_b = held[b]
    first.flush(held_b.release())
    (held_b,) = second.claim(1)
    assert held_b.run == b
    wakes: dict[Worker, Held] = {}
    for worker, run in ((first, idle_b), (second, idle_a)):
        assert lab.cancel(run)
        (wakes[worker],) = worker.claim(0)
    gate = lab.connection(autocommit=False)
    gate.execute("select from stepwell.runs where id = any(%s) for update", [[a, b]])
    with (
        meanwhile(lambda: first.flush(held[a].finish(state="cancelled"), wakes[first].wake())) as one,
        meanwhile(lambda: second.flush(held_b.finish(state="cancelled"), wakes[second].wake())) as other,
    ):
        for worker in (first, second):  # both have counted the end of their claimed run
            lab.wait_for_lock(worker.db)
        gate.commit()
    assert one.result() == other.result() == [APPLIED, APPLIED]
    assert totals(lab) == recorded(lab) == {("run", "a", "cancelled"): 2, ("run", "b", "cancelled"): 2}


def colliding(lab: Lab) -> tuple[Db, Db]:
    """Return two connections whose backends count in the same shard."""
    first = lab.connection()
    for _ in range(20 * SHARDS):
        second = lab.connection()
        if (second.info.backend_pid - first.info.backend_pid) % SHARDS == 0:
            return first, second
        second.close()
    raise AssertionError("no two backends count in the same shard")
