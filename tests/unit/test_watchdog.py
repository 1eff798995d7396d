"""Who is held for dead, stopped or hung, and how fast the dead are replaced: rules in which time is an argument."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from outbox.errors import ConfigError
from outbox.settings import Settings
from worker.engine.vitals import Vitals
from worker.supervision import children
from worker.supervision.children import Backoff
from worker.supervision.liveness import Detector, Observer, Sighting, Verdict
from worker.supervision.pipe import EXIT_DECLARED_DEAD, Briefing
from worker.supervision.supervisor import Supervisor
from worker.supervision.watchdog import Unchanged, Watchdog

SETTINGS = Settings(beat_seconds=1.0, lost_lock_seconds=3.0, lease_seconds=15.0)


# -- for how long ------------------------------------------------------------------------------------


def test_a_value_is_unchanged_for_as_long_as_somebody_looked() -> None:
    watched = Unchanged(longest_gap_seconds=2.0)
    assert watched.see("a", 10.0) == 0.0
    assert watched.see("a", 11.0) == 1.0
    assert watched.see("a", 11.5) == 1.5
    assert watched.see("b", 12.0) == 0.0
    assert watched.see("a", 13.0) == 0.0


def test_a_gap_between_two_looks_counts_little() -> None:
    watched = Unchanged(longest_gap_seconds=2.0)
    watched.see("a", 0.0)
    assert watched.see("a", 3600.0) == 2.0


# -- the workers of others ---------------------------------------------------------------------------


class Looks:
    """An observer that looks once a second at one worker."""

    def __init__(self, *, settle_seconds: float = 0.0) -> None:
        self.observer = Observer(SETTINGS, settle_seconds=settle_seconds)
        self.now = 1000.0

    def at(
        self,
        beat: int,
        *,
        locked: bool,
        buried: bool = False,
        own: tuple[int, ...] = (),
        locking: bool = True,
    ) -> list[Verdict]:
        self.now += 1.0
        seen = Sighting(7, beat, buried, locked, locking=locking)
        return self.observer.look([seen], self.now, own=own)

    def until_verdict(self, most: int = 100, **seen: Any) -> tuple[int, Detector]:
        for looked in range(1, most + 1):
            if verdicts := self.at(**seen):
                (verdict,) = verdicts
                assert verdict.worker_id == 7
                return looked, verdict.detector
        raise AssertionError("nobody was held for dead")


def test_a_worker_that_beats_is_alive_without_its_lock() -> None:
    looks = Looks()
    assert not any(looks.at(beat, locked=False) for beat in range(50))


def test_no_beat_and_no_lock_is_a_lost_lock_after_three_seconds() -> None:
    assert Looks().until_verdict(beat=1, locked=False) == (4, "lost_lock")


def test_no_beat_under_a_held_lock_takes_the_lease() -> None:
    assert Looks().until_verdict(beat=1, locked=True) == (16, "lease")


def test_a_worker_whose_supervisor_can_hold_no_lock_is_judged_by_its_lease() -> None:
    assert Looks().until_verdict(beat=1, locked=False, locking=False) == (16, "lease")


def test_the_lock_must_be_absent_throughout() -> None:
    looks = Looks()
    for locked in (False, False, False, True, False, False, False):
        assert not looks.at(1, locked=locked)
    assert looks.at(1, locked=False)[0].detector == "lost_lock"


def test_a_lock_that_is_lost_late_counts_from_when_it_was_lost() -> None:
    looks = Looks()
    for _ in range(8):
        assert not looks.at(1, locked=True)
    assert looks.until_verdict(beat=1, locked=False) == (4, "lost_lock")


def test_an_observer_that_was_away_has_seen_nothing() -> None:
    looks = Looks()
    looks.at(1, locked=True)
    looks.now += 3600
    assert not looks.at(1, locked=True)
    assert not looks.at(2, locked=True)


def test_own_workers_are_not_judged() -> None:
    looks = Looks()
    assert not any(looks.at(1, locked=False, own=(7,)) for _ in range(50))


def test_after_an_outage_nobody_is_judged_before_the_others_can_be_back() -> None:
    assert Looks(settle_seconds=2.0).until_verdict(beat=1, locked=False) == (6, "lost_lock")


def test_a_reclaim_that_was_cut_short_is_taken_up_although_the_lock_is_held() -> None:
    assert Looks().until_verdict(beat=1, locked=True, buried=True) == (4, "lease")


# -- one's own children ------------------------------------------------------------------------------


class Watched:
    """A child that is looked at four times a second."""

    def __init__(self) -> None:
        self.dog = Watchdog(Settings(stopped_after_seconds=5, hang_after_seconds=120))
        self.now = 0.0
        self.beats = 1

    def look(
        self, seconds: float, *, beating: bool = True, stopped: bool = False, vitals: Vitals | None = None
    ) -> str | None:
        said = None
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            beats = int(self.now * 2) if beating else self.beats
            said = said or self.dog.look(stopped=stopped, beats=beats, vitals=vitals, now=self.now)
        return said


def vitals(*, flushes: int = 0, pending: int = 0, connected: bool = True) -> Vitals:
    return Vitals(1, flushes, pending, connected, claiming=True, in_flight=0)


def test_a_child_that_beats_is_left_alone() -> None:
    assert Watched().look(1000, vitals=vitals()) is None


def test_a_stopped_child_is_killed_after_five_seconds() -> None:
    watched = Watched()
    assert watched.look(4, stopped=True, beating=False) is None
    assert "stopped" in (watched.look(2, stopped=True, beating=False) or "")


def test_a_child_that_is_continued_in_time_is_left_alone() -> None:
    watched = Watched()
    for _ in range(10):
        assert watched.look(4, stopped=True, beating=False) is None
        assert watched.look(1) is None


def test_a_child_that_beats_no_more_is_killed() -> None:
    watched = Watched()
    assert watched.look(119, beating=False) is None
    assert "event loop" in (watched.look(2, beating=False) or "")


def test_a_child_that_is_loading_has_more_time() -> None:
    """On a machine that is too busy, killing those that come up would only keep it so."""
    watched = Watched()
    watched.beats = 0
    assert watched.look(299, beating=False) is None
    assert "loading" in (watched.look(2, beating=False) or "")


def test_a_child_that_is_stopped_while_it_loads_is_killed_as_any_other() -> None:
    watched = Watched()
    watched.beats = 0
    assert "stopped" in (watched.look(6, beating=False, stopped=True) or "")


def test_a_committer_with_work_and_a_connection_must_make_progress() -> None:
    watched = Watched()
    assert watched.look(1000, vitals=vitals(pending=0)) is None
    assert watched.look(1000, vitals=vitals(pending=3, connected=False)) is None
    assert watched.look(119, vitals=vitals(pending=3)) is None
    assert watched.look(119, vitals=vitals(pending=3, flushes=1)) is None
    assert "committer" in (watched.look(2, vitals=vitals(pending=3, flushes=1)) or "")


def test_a_supervisor_that_was_stopped_itself_kills_nobody() -> None:
    dog = Watchdog(Settings())
    dog.look(stopped=False, beats=1, vitals=None, now=0.0)
    assert dog.look(stopped=True, beats=1, vitals=None, now=10_000.0) is None


# -- replacing them ----------------------------------------------------------------------------------


def test_a_first_crash_is_followed_by_a_new_child_at_once() -> None:
    assert Backoff().after(1, lived_seconds=0.1) == 0.0


def test_children_that_keep_dying_young_are_replaced_ever_more_slowly() -> None:
    backoff = Backoff()
    waits = [backoff.after(-11, lived_seconds=1.0) for _ in range(12)]
    assert waits[:5] == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert waits[-1] == children.BACKOFF_LONGEST_SECONDS


def test_a_child_that_lived_ends_the_slowness() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after(1, lived_seconds=1.0)
    assert backoff.after(1, lived_seconds=60.0) == 0.0
    assert backoff.after(1, lived_seconds=1.0) == 0.0


def test_a_child_that_was_declared_dead_is_replaced_at_once() -> None:
    backoff = Backoff()
    assert [backoff.after(EXIT_DECLARED_DEAD, lived_seconds=1.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert backoff.after(EXIT_DECLARED_DEAD, lived_seconds=1.0) > 0.0


def test_a_briefing_arrives_as_it_was(tmp_path: Path) -> None:
    briefing = Briefing(
        settings=Settings(database_url="postgresql://u:secret@h/d", data_dir=tmp_path, concurrency=7),
        url="postgresql://u:secret@h/d",
        app="shop.flows",
        worker_id=2**63 - 1,
        supervisor_id=1,
        queues=("a", "b"),
        log_level=logging.DEBUG,
    )
    assert Briefing.from_line(briefing.to_line()) == briefing


def test_no_processes_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Supervisor(Settings(), "postgresql://", app="flows", processes=0)
