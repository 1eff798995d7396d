"""Random programs, run undisturbed and then among random kills: both must come out alike.

`STEPWELL_PROGRAMS` says how many, `STEPWELL_SEED` which: a failure names both.
"""

from __future__ import annotations

import os
import random
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
from tests.crash.programs import Maker, Node, signals_of
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
    calm = {f"calm{n}": p for n, p in enumerate(programs)}
    storm = {f"storm{n}": p for n, p in enumerate(programs)}

    undisturbed = _ran(fleet, calm, kills=0)
    disturbed = _ran(fleet, storm, kills=max(KILLS, KILLS * PROGRAMS // 200))

    for number, program in enumerate(programs):
        named = f"program {number} of seed {SEED}: {program}"
        assert _plain(disturbed[f"storm{number}"], "storm") == _plain(undisturbed[f"calm{number}"], "calm"), (
            named
        )
    assert _saved(fleet, "storm") == _saved(fleet, "calm"), (
        "what transactional steps did, and undid, exactly once"
    )
    assert _effects(fleet, "storm").keys() == _effects(fleet, "calm").keys(), (
        "what other steps did, at least once"
    )
    assert set(_effects(fleet, "calm").values()) <= {1}, "and once when nothing was killed"
    assert _keys_are_stable(fleet)
    assert fleet.db.execute("select count(*) from stepwell.tasks").fetchone() == (0,)
    assert _unrecorded(fleet) == []
    subprocess.run(
        [sys.executable, "-m", "worker.cli", "replay", str(APP), "--since", "1d"],
        env=fleet.environment, check=True, cwd=fleet.home,
    )  # fmt: skip


def _ran(fleet: Fleet, programs: dict[str, list[Node]], kills: int) -> dict[str, tuple[Any, ...]]:
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


def _saved(fleet: Fleet, tag: str) -> Counter[tuple[str, int, str]]:
    rows = fleet.db.execute("select tag, number, what from saved where tag like %s", (f"{tag}%",))
    return Counter((where.removeprefix(tag), number, what) for where, number, what in rows)


def _ledger(fleet: Fleet) -> list[tuple[str, str]]:
    lines = (fleet.home / "ledger").read_text().splitlines()
    return [(effect, key) for effect, _, key in (line.partition("\t") for line in lines)]


def _effects(fleet: Fleet, tag: str) -> Counter[str]:
    return Counter(effect.removeprefix(tag) for effect, _ in _ledger(fleet) if effect.startswith(tag))


def _keys_are_stable(fleet: Fleet) -> bool:
    """Tell whether each effect had one idempotency key, however often it was tried."""
    return len(set(_ledger(fleet))) == len({effect for effect, _ in _ledger(fleet)})


def _unrecorded(fleet: Fleet) -> list[Any]:
    """Return runs whose records are not numbered 1, 2, 3, …"""
    return fleet.db.execute(
        "select run_id from stepwell.outbox group by run_id having count(*) <> max(seq) or count(distinct seq) <> max(seq)"
    ).fetchall()
