"""Random programs, run undisturbed and then among kills, pauses, cancellations and deadlines, all of them random.

However they are disturbed, they must come out alike, or else cancelled or late, with what they did undone.

`STEPWELL_PROGRAMS` says how many, `STEPWELL_SEED` which: a failure names both.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from psycopg import sql
from psycopg.types.json import Json

from tests.crash.fleet import ROOT, Fleet
from tests.crash.programs import SIDE, Maker, Node, careful_of, chancy_of, signals_of
from tests.waiting import wait_until

pytestmark = pytest.mark.crash

PROGRAMS = int(os.environ.get("STEPWELL_PROGRAMS", "200"))
SEED = int(os.environ.get("STEPWELL_SEED", "20261122"))
APP = ROOT / "tests" / "crash" / "programs.py"
BETWEEN_KILLS_SECONDS = (0.05, 0.5)
KILLS = 12
SECONDS_OF_MAIL = 4.0
"""How long signals go on coming."""
LATE = "outbox.errors.DeadlineExceeded"
SECONDS_EACH = 0.3
"""What a program may take at most, killed again and again, on a slow machine."""

Mail = defaultdict[UUID, list[tuple[str, str]]]
"""Signals, by name and payload, and the runs that they are for."""


@pytest.fixture
def fleet(database_url: str, tmp_path: Path) -> Iterator[Fleet]:
    started = Fleet(
        database_url,
        tmp_path,
        app=APP,
        lost_lock_seconds=1.0,
        grace_seconds=5.0,
        poison_after=10_000,
        threads=8,
        queues=("default", SIDE),
    )
    started.db.execute("drop table saved; create table saved (tag text, number int, what text)")
    try:
        started.start(2)
        yield started
    finally:
        started.stop()


def test_random_programs_come_out_alike_whatever_is_killed(fleet: Fleet) -> None:
    programs = [Maker(SEED + number).program() for number in range(PROGRAMS)]
    kills = max(KILLS, KILLS * PROGRAMS // 200)

    returned: Mail = defaultdict(list)
    undisturbed = _ran(fleet, _tagged("calm", programs), returned)
    disturbed = {
        "storm": _ran(fleet, _tagged("storm", programs), returned, kills=kills),
        "idle": _ran(fleet, _tagged("idle", programs, every=4), returned, pausing=True),
        "stray": _ran(
            fleet, _tagged("stray", programs, every=4), returned, kills=kills // 3, cancelling=True
        ),
        "late": _ran(fleet, _tagged("late", programs, every=4), returned, kills=kills // 3, deadlines=True),
    }
    ways_out = {"stray": ("cancelled", None), "late": ("failed", LATE)}
    for tag, ended in disturbed.items():
        for each, (state, output, kind, message) in ended.items():
            number = int(each.removeprefix(tag))
            calm = _plain(undisturbed[f"calm{number}"], "calm")
            assert (state, kind) == ways_out.get(tag) or _plain(
                (state, output, kind, message), tag
            ) == calm, f"{tag}, program {number} of seed {SEED}: {programs[number]}"
    chancy = {n: set(chancy_of(program)) for n, program in enumerate(programs)}
    careful = {n: set(careful_of(program)) for n, program in enumerate(programs)}
    anew = _begun_again(fleet)
    saved = {tag: _saved(fleet, tag, chancy) for tag in ("calm", "storm")}
    assert saved["storm"].keys() == saved["calm"].keys(), "what transactional steps did, and undid"
    assert {did: times for did, times in saved["storm"].items() if f"storm{did[0]}" not in anew} == {
        did: times for did, times in saved["calm"].items() if f"storm{did[0]}" not in anew
    }, "exactly once"
    assert _effects(fleet, "storm", chancy).keys() == _effects(fleet, "calm", chancy).keys(), (
        "what other steps did, at least once"
    )
    assert _repeated(fleet, "calm") == _repeated(fleet, "idle") == [], "and once when nothing was killed"
    repeated = (each for each in _repeated(fleet, "storm") if f"storm{each[0]}" not in anew)
    assert [each for each in repeated if each[1] in careful[_program(each[0])]] == [], (
        "and once where somebody looks what came of it"
    )
    assert _wrongly_undone(fleet) == []
    assert _unstable_keys(fleet) == {}

    # Whatever was cancelled or late comes to what it would have come to, once it is retried.
    disturbed = {
        tag: _brought_back(fleet, list(disturbed[tag]), returned, kills=kills // 3) for tag in ways_out
    }
    for tag, ended in disturbed.items():
        for each, came_to in ended.items():
            number = int(each.removeprefix(tag))
            assert _plain(came_to, tag) == _plain(undisturbed[f"calm{number}"], "calm"), (
                f"{tag} and brought back, program {number} of seed {SEED}: {programs[number]}"
            )
            assert _left_booked(fleet, each, chancy[number]) == _left_booked(
                fleet, f"calm{number}", chancy[number]
            )
    assert fleet.db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)
    assert _unrecorded(fleet) == []
    subprocess.run(
        [sys.executable, "-m", "worker.cli", "replay", str(APP), "--since", "1d"],
        env=fleet.environment, check=True, cwd=fleet.home,
    )  # fmt: skip


def _tagged(tag: str, programs: list[list[Node]], *, every: int = 1) -> dict[str, list[Node]]:
    return {f"{tag}{n}": programs[n] for n in range(0, len(programs), every)}


def _ran(
    fleet: Fleet,
    programs: dict[str, list[Node]],
    returned: Mail,
    *,
    kills: int = 0,
    cancelling: bool = False,
    pausing: bool = False,
    deadlines: bool = False,
) -> dict[str, tuple[Any, ...]]:
    """Run the programs, among so many kills; return how each has ended, and signals that came after that.

    `cancelling`: some are cancelled. `pausing`: each is paused and resumed, now and then. `deadlines`: each has one.
    """
    chance = random.Random(SEED)
    runs = {tag: fleet.enqueue("interpret", tag=tag, program=program) for tag, program in programs.items()}
    if deadlines:
        for run in runs.values():
            fleet.db.execute(
                "update stepwell.runs set deadline_at = clock_timestamp() + make_interval(secs => %s) where id = %s",
                (chance.uniform(0, SECONDS_OF_MAIL), run),
            )
    plan = Plan()
    for tag, program in programs.items():
        _post(fleet, runs[tag], program, plan, chance, returned)
    moments = _plan_kills(fleet, kills, plan, chance)
    if cancelling:
        for moment in moments:
            for run in chance.sample(list(runs.values()), len(runs) // kills + 1):
                plan.add(moment, partial(_call, fleet, "cancel", run))
    if pausing:
        for run in runs.values():
            for _ in range(chance.randint(1, 3)):
                since = chance.uniform(0, SECONDS_OF_MAIL)
                plan.add(since, partial(_call, fleet, "pause", run))
                plan.add(since + chance.uniform(0, 1), partial(_call, fleet, "resume", run))
    plan.carry_out()
    _all_ended(fleet, len(programs))
    return {tag: _ended(fleet, run) for tag, run in runs.items()}


def _brought_back(fleet: Fleet, tags: list[str], returned: Mail, *, kills: int) -> dict[str, tuple[Any, ...]]:
    """Have what was cancelled or late go on, or begin again if it was undone; return how each has ended."""
    chance = random.Random(SEED)
    fleet.db.execute("update stepwell.runs set deadline_at = null")
    # A run that has started anew has another tag, which begins as the one before.
    rows = fleet.db.execute(
        "select split_part(input ->> 'tag', '/', 1), id from stepwell.runs where parent_id is null order by id"
    ).fetchall()
    runs = {tag: run for tag, run in rows if tag in tags}
    plan = Plan()
    for run in runs.values():
        plan.add(chance.uniform(0, SECONDS_OF_MAIL), partial(_bring_back, fleet, run, returned))
    _plan_kills(fleet, kills, plan, chance)
    plan.carry_out()
    _all_ended(fleet, len(tags))
    return {tag: _ended(fleet, run) for tag, run in runs.items()}


def _plan_kills(fleet: Fleet, kills: int, plan: Plan, chance: random.Random) -> list[float]:
    """Have so many workers killed, one after the other; return when."""
    moments = list(itertools.accumulate(chance.uniform(*BETWEEN_KILLS_SECONDS) for _ in range(kills)))
    for moment in moments:
        plan.add(moment, lambda: fleet.kill_one(chance) if _open(fleet) else None)
    return moments


def _bring_back(fleet: Fleet, run: UUID, returned: Mail) -> None:
    state, _, kind, _ = _ended(fleet, run)
    if state == "cancelled" or kind == LATE:
        if _call(fleet, "retry", run) == (None,):
            _call(fleet, "rewind", run, [])
        for name, payload in returned.pop(run, ()):
            _call(fleet, "signal", run, name, Json(payload))


def _post(
    fleet: Fleet, run: UUID, program: list[Node], plan: Plan, chance: random.Random, returned: Mail
) -> None:
    """Have the signals sent that a program waits for: half of them now, the others while it is at work."""

    def send(name: str, payload: str) -> None:
        if _call(fleet, "signal", run, name, Json(payload)) == (False,):
            returned[run].append((name, payload))

    late = 0.0
    for name, payload in signals_of(program):
        if chance.random() < 0.5:
            late += chance.uniform(0, (SECONDS_OF_MAIL - late) / 2)
        plan.add(late, partial(send, name, payload))


def _call(fleet: Fleet, function: str, *given: Any) -> Any:
    asked = sql.SQL("select stepwell.{}({})").format(
        sql.Identifier(function), sql.SQL(", ").join([sql.Placeholder()] * len(given))
    )
    return fleet.db.execute(asked, given).fetchone()


class Plan:
    """What is to be done at which moment, in seconds from when it is begun to be carried out."""

    def __init__(self) -> None:
        self._acts: list[tuple[float, Callable[[], Any]]] = []

    def add(self, at: float, act: Callable[[], Any]) -> None:
        self._acts.append((at, act))

    def carry_out(self) -> None:
        """Do it all, each thing not before its time."""
        began = time.monotonic()
        for at, act in sorted(self._acts, key=lambda each: each[0]):
            time.sleep(max(0.0, began + at - time.monotonic()))
            act()


def _all_ended(fleet: Fleet, count: int) -> None:
    """Wait until every run has ended; look at those that need a person: say how held steps ended, have undos tried again."""

    def ended() -> bool:
        _look_at_blocked(fleet)
        return not _open(fleet)

    wait_until(ended, 60 + SECONDS_EACH * count, what="every run to end")


LOOKED_AT = "state = 'blocked' and (error ->> 'type' = 'Held' or error ->> 'reason' = 'an undo failed')"
"""Runs that are waited for as open ones are, because a person has to look at them and does."""


def _look_at_blocked(fleet: Fleet) -> None:
    blocked = fleet.db.execute(
        f"select id, key_epoch, error ->> 'type', error ->> 'message' from stepwell.runs where {LOOKED_AT}"
    ).fetchall()
    for run, key_epoch, kind, message in blocked:
        path, effects = "", list[str]()
        if kind == "Held":
            path = re.findall(r"step held at ([0-9.]+) was interrupted", message)[0]
            key = f"{run}:{path}" + (f":{key_epoch}" if key_epoch else "")
            effects = [effect for effect, by in _ledger(fleet) if by == key]
        if effects:
            _call(fleet, "resolve", run, [int(number) for number in path.split(".")], Json(effects[0]))
        else:
            _call(fleet, "retry", run)


def _open(fleet: Fleet) -> int:
    row = fleet.db.execute(
        f"select count(*) from stepwell.runs where state = 'open' or {LOOKED_AT}"
    ).fetchone()
    assert row is not None
    return int(row[0])


def _ended(fleet: Fleet, run: UUID) -> tuple[Any, ...]:
    row = fleet.db.execute(
        "select state, output::text, error ->> 'type', error ->> 'message' from stepwell.runs where id = %s",
        (run,),
    ).fetchone()
    assert row is not None
    return row


def _plain(ended: tuple[Any, ...], tag: str) -> tuple[Any, ...]:
    return tuple(None if part is None else str(part).replace(tag, "") for part in ended)


def _saved(fleet: Fleet, tag: str, chancy: dict[int, set[int]]) -> Counter[tuple[str, int, str]]:
    rows = fleet.db.execute("select tag, number, what from saved where tag like %s", (f"{tag}%",))
    saved = ((where.removeprefix(tag), number, what) for where, number, what in rows)
    return Counter(each for each in saved if each[1] not in chancy[_program(each[0])])


def _program(tag: str) -> int:
    return int(tag.partition("/")[0])


def _begun_again(fleet: Fleet) -> dict[str, int]:
    """Return how often each run has begun that has begun more than once, by its tag.

    A retry of its parent begins a child again that had failed while a step of the parent was held; and the children of
    that one are others then, as are those in place of what still cleans up.
    """
    rows = fleet.db.execute(
        """select tag, begun from (
               select r.input ->> 'tag' as tag, count(distinct r.id) + count(o.run_id) as begun
                 from stepwell.runs r
                 left join stepwell.outbox o on o.run_id = r.id and o.kind = 'epoch' and o.outcome = 'rewind'
                group by 1) b
            where begun > 1"""
    ).fetchall()
    return dict(rows)


def _wrongly_undone(fleet: Fleet) -> list[Any]:
    """Return what was booked more often than its run has begun, or not unbooked as it has ended, or unbooked otherwise."""
    begun = _begun_again(fleet)
    rows = fleet.db.execute(
        """select s.tag, s.number, r.state, s.booked, s.unbooked
             from (select tag, number, count(*) filter (where what = 'book') as booked,
                          count(*) filter (where what like 'unbook %') as unbooked
                     from saved group by tag, number) s
             join lateral (select state from stepwell.runs where input ->> 'tag' = s.tag
                            order by id desc limit 1) r on true"""
    ).fetchall()

    def undone(tag: str, state: str, booked: int) -> int:
        if state in ("failed", "cancelled"):
            return booked
        return booked - 1 if tag in begun else 0

    return [
        (tag, number, state, booked, unbooked)
        for tag, number, state, booked, unbooked in rows
        if booked > begun.get(tag, 1) or unbooked != undone(tag, state, booked)
    ]


def _left_booked(fleet: Fleet, tag: str, chancy: set[int]) -> dict[int, int]:
    """Return how often each thing is booked that a run, but for its children, has booked."""
    rows = fleet.db.execute(
        """select number, count(*) filter (where what = 'book') - count(*) filter (where what like 'unbook %%')
             from saved where tag = %s group by number""",
        (tag,),
    ).fetchall()
    return {number: left for number, left in rows if left and number not in chancy}


def _ledger(fleet: Fleet) -> list[tuple[str, str]]:
    lines = (fleet.home / "ledger").read_text().splitlines()
    return [(effect, key) for effect, _, key in (line.partition("\t") for line in lines)]


def _effects(fleet: Fleet, tag: str, chancy: dict[int, set[int]]) -> Counter[str]:
    effects = (effect.removeprefix(tag) for effect, _ in _ledger(fleet) if effect.startswith(tag))
    return Counter(each for each in effects if int(each.split()[1]) not in chancy[_program(each.split()[0])])


def _repeated(fleet: Fleet, tag: str) -> list[tuple[str, int]]:
    """Return the run's tag, but for its beginning, and the id of each step that has taken effect more than once."""
    counted = Counter(effect for effect, _ in _ledger(fleet) if effect.startswith(tag))
    where = (effect.removeprefix(tag).split() for effect, times in counted.items() if times > 1)
    return [(said[0], int(said[1])) for said in where]


def _unstable_keys(fleet: Fleet) -> dict[str, set[str]]:
    """Return effects that had more than one idempotency key, however often they were tried, and those keys.

    What is done anew has other keys, and shall have: in a run that was rewound, since a retry of its parent had it
    begun again, in runs that it has made since, and in those that were made in place of others.
    """
    rows = fleet.db.execute(
        """with recursive anew (id) as (
               select run_id from stepwell.outbox where kind = 'epoch' and outcome = 'rewind'
               union select parent_id from stepwell.runs where parent_id is not null and parent_path is null
               union select c.id from stepwell.runs c join anew on c.parent_id = anew.id)
           select id::text from anew"""
    ).fetchall()
    anew = {run for (run,) in rows}
    keys = defaultdict[str, set[str]](set)
    for effect, key in _ledger(fleet):
        run, _path, *key_epoch = key.split(":")
        # Within one run and one of its key epochs there is but one call that has this effect.
        keys[" ".join([effect, "of", run, *key_epoch]) if run in anew else effect].add(key)
    return {effect: several for effect, several in keys.items() if len(several) > 1}


def _unrecorded(fleet: Fleet) -> list[Any]:
    """Return runs whose records are not numbered 1, 2, 3, …"""
    return fleet.db.execute(
        "select run_id from stepwell.outbox group by run_id having count(*) <> max(seq) or count(distinct seq) <> max(seq)"
    ).fetchall()
