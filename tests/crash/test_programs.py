"""Random programs, run undisturbed and then among random kills: both must come out alike.

`STEPWELL_PROGRAMS` says how many, `STEPWELL_SEED` which: a failure names both.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.crash.fleet import ROOT, Fleet
from tests.crash.programs import Maker, Node, chancy_of, signals_of
from tests.waiting import wait_until

pytestmark = pytest.mark.crash

PROGRAMS = int(os.environ.get("STEPWELL_PROGRAMS", "200"))
SEED = int(os.environ.get("STEPWELL_SEED", "20261122"))
APP = ROOT / "tests" / "crash" / "programs.py"
BETWEEN_KILLS_SECONDS = (0.05, 0.5)
KILLS = 12
SECONDS_EACH = 0.3
"""What a program may take at most, killed again and again, on a slow machine."""


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

    undisturbed = _ran(fleet, _tagged("calm", programs), kills=0)
    disturbed = _ran(fleet, _tagged("storm", programs), kills=kills)
    # Cancelled at any moment, a run is over as it would have been, or cancelled.
    stopped = _ran(fleet, _tagged("stray", programs[::4]), kills=kills // 3, cancelling=True)

    for number, program in enumerate(programs):
        named = f"program {number} of seed {SEED}: {program}"
        calm = _plain(undisturbed[f"calm{number}"], "calm")
        assert _plain(disturbed[f"storm{number}"], "storm") == calm, named
        if number % 4 == 0:
            stray = _plain(stopped[f"stray{number // 4}"], "stray")
            assert stray[0] == "cancelled" or _renumbered(stray, number // 4, number) == calm, named
    chancy = {n: set(chancy_of(program)) for n, program in enumerate(programs)}
    assert _saved(fleet, "storm", chancy) == _saved(fleet, "calm", chancy), (
        "what transactional steps did, and undid, exactly once"
    )
    assert _effects(fleet, "storm", chancy).keys() == _effects(fleet, "calm", chancy).keys(), (
        "what other steps did, at least once"
    )
    assert [each for each, times in _effects(fleet, "calm", chancy).items() if times > 1] == [], (
        "and once when nothing was killed"
    )
    assert _wrongly_undone(fleet) == []
    assert _keys_are_stable(fleet)
    assert fleet.db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)
    assert _unrecorded(fleet) == []
    subprocess.run(
        [sys.executable, "-m", "worker.cli", "replay", str(APP), "--since", "1d"],
        env=fleet.environment, check=True, cwd=fleet.home,
    )  # fmt: skip


def _tagged(tag: str, programs: list[list[Node]]) -> dict[str, list[Node]]:
    return {f"{tag}{n}": program for n, program in enumerate(programs)}


def _ran(
    fleet: Fleet, programs: dict[str, list[Node]], kills: int, *, cancelling: bool = False
) -> dict[str, tuple[Any, ...]]:
    """Run the programs, among so many kills; return how each has ended."""
    runs = {tag: fleet.enqueue("interpret", tag=tag, program=program) for tag, program in programs.items()}
    for tag, program in programs.items():
        for signal in signals_of(program):
            fleet.db.execute("select stepwell.signal(%s, %s, to_json(%s::text))", (runs[tag], signal, signal))
    chance = random.Random(SEED)
    for _ in range(kills):
        if not _open(fleet):
            break
        time.sleep(chance.uniform(*BETWEEN_KILLS_SECONDS))
        if cancelling:
            for run in chance.sample(list(runs.values()), len(runs) // kills + 1):
                fleet.db.execute("select stepwell.cancel(%s)", (run,))
        fleet.kill_one(chance)
    wait_until(lambda: not _open(fleet), 60 + SECONDS_EACH * len(programs), what="every run to end")
    return {tag: _ended(fleet, run) for tag, run in runs.items()}


def _open(fleet: Fleet) -> int:
    row = fleet.db.execute("select count(*) from stepwell.runs where state = 'open'").fetchone()
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


def _renumbered(ended: tuple[Any, ...], number: int, other: int) -> tuple[Any, ...]:
    """Return how a run has ended as if it had another number: outputs quote the tags of their runs."""
    return tuple(None if part is None else re.sub(rf'"{number}(?=[ /])', f'"{other}', part) for part in ended)


def _saved(fleet: Fleet, tag: str, chancy: dict[int, set[int]]) -> Counter[tuple[str, int, str]]:
    rows = fleet.db.execute("select tag, number, what from saved where tag like %s", (f"{tag}%",))
    saved = ((where.removeprefix(tag), number, what) for where, number, what in rows)
    return Counter(each for each in saved if each[1] not in chancy[_program(each[0])])


def _program(tag: str) -> int:
    return int(tag.partition("/")[0])


def _wrongly_undone(fleet: Fleet) -> list[Any]:
    """Return what was booked more than once, or not unbooked as its run has ended, or unbooked otherwise."""
    return fleet.db.execute(
        """select s.tag, s.number, r.state, s.booked, s.unbooked
             from (select tag, number, count(*) filter (where what = 'book') as booked,
                          count(*) filter (where what like 'unbook %') as unbooked
                     from saved group by tag, number) s
             join stepwell.runs r on r.input ->> 'tag' = s.tag
            where s.booked > 1
               or s.unbooked <> case when r.state in ('failed', 'cancelled') then s.booked else 0 end"""
    ).fetchall()


def _ledger(fleet: Fleet) -> list[tuple[str, str]]:
    lines = (fleet.home / "ledger").read_text().splitlines()
    return [(effect, key) for effect, _, key in (line.partition("\t") for line in lines)]


def _effects(fleet: Fleet, tag: str, chancy: dict[int, set[int]]) -> Counter[str]:
    effects = (effect.removeprefix(tag) for effect, _ in _ledger(fleet) if effect.startswith(tag))
    return Counter(each for each in effects if int(each.split()[1]) not in chancy[_program(each.split()[0])])


def _keys_are_stable(fleet: Fleet) -> bool:
    """Tell whether each effect had one idempotency key, however often it was tried."""
    return len(set(_ledger(fleet))) == len({effect for effect, _ in _ledger(fleet)})


def _unrecorded(fleet: Fleet) -> list[Any]:
    """Return runs whose records are not numbered 1, 2, 3, …"""
    return fleet.db.execute(
        "select run_id from stepwell.outbox group by run_id having count(*) <> max(seq) or count(distinct seq) <> max(seq)"
    ).fetchall()
