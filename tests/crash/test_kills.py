"""Kill -9 at every boundary of a run: nothing is lost, nothing that finished is repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.fleet import Fleet

pytestmark = pytest.mark.crash

VICTIMS = ["worker", "tree"]


@pytest.fixture
def fleet(database_url: str, tmp_path: Path) -> Iterator[Fleet]:
    started = Fleet(database_url, tmp_path, lost_lock_seconds=1.0, grace_seconds=5.0)
    try:
        started.start()
        started.start()
        yield started
    finally:
        started.stop()


def _succeeds(fleet: Fleet, run: object, name: str) -> None:
    fleet.wait_for(run, "succeeded")  # type: ignore[arg-type]
    row = fleet.db.execute("select output from stepwell.runs where id = %s", (run,)).fetchone()
    assert row is not None
    assert row[0] == [f"hello {name}", 6 + len(name), 6 + len(name), f"paid {name}"]
    assert fleet.db.execute("select count(*) from saved").fetchone() == (1,)
    assert fleet.db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("step", ["greet", "count", "save", "pay"])
def test_killed_while_a_step_runs_it_runs_again_and_no_other(fleet: Fleet, step: str, victim: str) -> None:
    with fleet.gate(f"before-{step}"):
        run = fleet.enqueue("journey", name="Ann")
        fleet.reached(f"before-{step}")
        fleet.kill(fleet.holder(run), victim)
    _succeeds(fleet, run, "Ann")
    assert fleet.effects() == {"greet": 1, "count": 1, "save": 1, "pay": 1}
    assert (step, 1, "interrupted") in fleet.history(run)
    assert len(fleet.keys(step)) == 1


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize(("step", "effects"), [("greet", 2), ("count", 2), ("save", 2), ("pay", 1)])
def test_killed_between_effect_and_record_only_that_step_is_tried_again(
    fleet: Fleet, step: str, effects: int, victim: str
) -> None:
    """A plain step takes effect again with the same key, a transactional one was rolled back, a verified one is asked."""
    with fleet.gate(f"after-{step}"):
        run = fleet.enqueue("journey", name="Bob")
        fleet.reached(f"after-{step}")
        fleet.kill(fleet.holder(run), victim)
    _succeeds(fleet, run, "Bob")
    assert fleet.effects() == {"greet": 1, "count": 1, "save": 1, "pay": 1} | {step: effects}
    assert len(fleet.keys(step)) == 1


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_while_parked_the_sleep_goes_on(fleet: Fleet, victim: str) -> None:
    with fleet.gate("before-greet"):
        first = fleet.enqueue("journey", name="Eve")
        fleet.reached("before-greet")
        held = fleet.holder(first)
        run = fleet.enqueue("nap", seconds=1.5)
        fleet.wait_for(run, "waiting")
        fleet.kill(held, victim)
    fleet.wait_for(run, "succeeded")
    assert fleet.history(run) == [("sleep", 0, "completed"), ("greet", 0, "completed")]
    _succeeds(fleet, first, "Eve")


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_held_step_waits_for_a_person(fleet: Fleet, victim: str) -> None:
    with fleet.gate("before-fire"):
        run = fleet.enqueue("launch", name="Saturn")
        fleet.reached("before-fire")
        fleet.kill(fleet.holder(run), victim)
        fleet.wait_for(run, "blocked")
    assert fleet.effects() == {}
    fleet.db.execute("select stepwell.retry(%s)", (run,))
    fleet.wait_for(run, "succeeded")
    assert fleet.effects() == {"fire": 1}


@pytest.mark.parametrize("victim", VICTIMS)
def test_totals_are_those_of_the_outbox(fleet: Fleet, victim: str) -> None:
    runs = [fleet.enqueue("nap", seconds=0.0) for _ in range(300)]
    with fleet.gate("after-greet"):
        run = fleet.enqueue("journey", name="Kim")
        fleet.reached("after-greet")
        fleet.kill(fleet.holder(run), victim)
    for each in (*runs, run):
        fleet.wait_for(each, "succeeded")
    counted = fleet.db.execute(
        "select kind, name, outcome, sum(value)::int from stepwell.counters where kind in ('run', 'step') group by 1, 2, 3"
    ).fetchall()
    recorded = fleet.db.execute(
        "select kind, name, outcome, count(*)::int from stepwell.outbox where kind in ('run', 'step') group by 1, 2, 3"
    ).fetchall()
    assert set(counted) == set(recorded)
