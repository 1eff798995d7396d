"""What the failover drill makes of what it has seen: a drill that finds nothing would prove nothing."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from tests.crash import drill, patroni
from tests.crash.checker import Verdict
from tests.crash.drill import Account, Acknowledged, Round, executed_again, report, silence
from tests.crash.ledger import Fact
from tests.crash.patroni import Replication, Unavailable

ROUND = Round("node1", "node2", 100.0, 21.5, enqueue_seconds=23.0, step_seconds=24.5)


def account(**found: Any) -> Account:
    usual = Account(
        rounds=[ROUND], acknowledged=100, refused=1, lost=[], verdict=Verdict(runs=101, completed=300),
        executed_again=0, reclaims=Counter(),
    )  # fmt: skip
    return replace(usual, **found)


def test_silence_is_the_longest_pause_that_began_about_the_kill() -> None:
    steady = [float(second) for second in range(90, 100)]
    assert silence([*steady, 100.2, 123.2, 124.0], 100.0) == 23.0, "what was under way came a little later"
    assert silence([*steady, 123.0, 124.0, 190.0], 100.0) == 24.0, "a later pause is another round's"
    assert silence(reversed([*steady, 123.0]), 100.0) == 24.0
    assert silence(steady, 100.0) == math.inf


def fact(key: str, what: str = "effect", *, transactional: bool = False) -> Fact:
    return Fact(uuid4().hex, what, "s", "r", "1", 1, key, 1, transactional, 1, 0.0, 0.0)


def test_an_effect_that_came_once_more_is_counted_where_nothing_rolls_it_back() -> None:
    facts = [fact("a"), fact("b"), fact("a"), fact("c", "start"), fact("c"), fact("d", transactional=True)]
    assert executed_again([*facts, fact("d", transactional=True)]) == 1


def test_what_was_acknowledged_and_is_not_there_is_told_and_is_no_clean_verdict() -> None:
    assert account().clean
    lost = Acknowledged("7", uuid4(), 99.0)
    spoilt = account(lost=[lost])
    assert not spoilt.clean
    lines = report(spoilt, Replication())
    assert "| … of which lost | 1 |" in lines
    assert "Verdict: NOT CLEAN." in lines
    assert any(str(lost.run) in line for line in lines)
    assert "Verdict: clean." in report(account(), Replication())


@pytest.mark.parametrize("found", ["lost", "stuck", "repeated", "stale_accepted", "disorder", "blocked"])
def test_whatever_the_checker_finds_is_no_clean_verdict(found: str) -> None:
    assert not account(verdict=Verdict(**{found: 1})).clean


def test_without_synchronous_replication_what_is_lost_is_told_and_not_judged() -> None:
    lines = report(account(lost=[Acknowledged("7", uuid4(), 99.0)]), Replication(synchronous=False))
    assert lines[0].startswith("Replication: asynchronous. ")
    assert not [line for line in lines if line.startswith("Verdict")]
    assert "| … of which lost | 1 |" in lines


def test_the_report_has_each_round_and_its_median_and_maximum() -> None:
    rounds = [
        ROUND,
        Round("node2", "node3", 200.0, 22.5, 25.0, 26.5),
        Round("node3", "node1", 300.0, 30.5, 33.0, 34.5),
    ]
    lines = report(account(rounds=rounds), Replication(strict=True))
    assert lines[0].startswith("Replication: synchronous, strict. 3 failovers, ")
    assert "| 2 | node2 | node3 | 22.5 s | 25.0 s | 26.5 s |" in lines
    assert "| p50 | | | 22.5 s | 25.0 s | 26.5 s |" in lines
    assert "| max | | | 30.5 s | 33.0 s | 34.5 s |" in lines


def test_each_workflow_gets_its_share() -> None:
    whole = sum(drill.WORKFLOWS.values())
    assert math.gcd(37, whole) == 1
    assert dict(Counter(map(drill._workflow, range(whole)))) == drill.WORKFLOWS


def test_patronis_rule_for_its_times_is_kept() -> None:
    for ttl in range(10, 61):
        settings = Replication(ttl_seconds=ttl).settings()
        assert settings["loop_wait"] + 2 * settings["retry_timeout"] <= ttl


def test_a_program_that_is_missing_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if name == "etcd" else f"/usr/bin/{name}"
    )
    with pytest.raises(Unavailable, match="apt-get install etcd-server"):
        patroni.programs()
