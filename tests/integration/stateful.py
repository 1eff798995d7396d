"""Run a state machine of hypothesis against a database, and see that it has exercised what it is there for.

A machine that can do nothing in most states passes, and notices nothing. By default hypothesis switches many of the
rules off in each example, so that of two dozen rules most hardly ever came to something: here all whose preconditions
hold are drawn from, each time. And machines count what really took place in `seen`: over all examples each of it has to
have happened.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import RuleBasedStateMachine, RuleStrategy, run_state_machine_as_test

from tests.protocol import CANCELLING, Db, Lab, meanwhile
from tests.waiting import wait_until

S = TypeVar("S")
T = TypeVar("T")

VERDICTS = ("fenced", "applied", "already", "behind")

SHRINKING_SECONDS = 40
"""Hypothesis makes a counterexample smaller for five minutes. Each attempt costs a quarter of a second here."""
ROUNDS = 3
RULE_FLOOR = 2


class Evenly(RuleStrategy):
    """Draws from all rules that may be taken, and counts them."""

    def _rule_is_enabled(self, r: Any) -> bool:
        return self.is_valid(r)

    def do_draw(self, data: Any) -> tuple[Any, dict[str, Any]]:
        drawn = super().do_draw(data)
        self.machine.seen[f"rule {drawn[0].function.__name__}"] += 1
        return drawn


class CountingMachine(RuleBasedStateMachine):
    """A machine on the database at `url`; counts in `seen`. `open` and `late` are for two statements at a time."""

    url: str
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self._rules_strategy = Evenly(self)
        self.lab = Lab(self.url)
        self.open, self.late = self.lab.connection(autocommit=False), self.lab.connection()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else an exception is on its way
                self.work_off()
                self.audit()
                self.seen["worked off"] += 1
        finally:
            self.lab.__exit__()

    def work_off(self) -> None:
        """Bring everything to an end."""

    def audit(self) -> None:
        """See that it is the right one."""

    def count(self, *codes: int) -> None:
        for code in codes:
            self.seen[VERDICTS[code % 4]] += 1
            self.seen["cancelling"] += code & CANCELLING > 0

    def overtaken(
        self, first: Callable[[Db], S], second: Callable[[Db], T], *, commits: bool
    ) -> tuple[S, Callable[[], T]]:
        """Have `second` wait for a transaction in which `first` was done, and which then ends; return both answers."""
        one, pid = first(self.open), self.late.info.backend_pid
        waits = "select cardinality(pg_blocking_pids(%s)) > 0"
        with meanwhile(lambda: second(self.late)) as answer:
            try:
                wait_until(lambda: answer.done() or self.lab.one(waits, pid), what="a lock to be waited for")
                early = answer.done() and answer.exception()
            finally:
                self.open.commit() if commits else self.open.rollback()
        assert early is False or isinstance(early, psycopg.errors.LockNotAvailable)
        self.seen["overtaken"] += 1
        return one, answer.result


def pick(options: Sequence[T], index: int) -> T:
    """Choose by a number: what there is to choose from is not known when hypothesis draws."""
    return options[index % len(options)]


def run_machine(
    machine: type[CountingMachine], url: str, floor: Mapping[str, int], *, examples: int, steps: int
) -> None:
    """Run a machine; see that each rule was drawn, and what is in `floor` seen, so often. STEPWELL_SEEN=1 prints it.

    What is drawn is left to chance, which may pass a rule over in all examples: then there are more of them.
    """
    seen: Counter[str] = Counter()
    here = type(machine.__name__, (machine,), {"url": url, "seen": seen})
    chosen: dict[str, Any] = {
        "max_examples": examples,
        "stateful_step_count": steps,
        "deadline": None,
        "report_multiple_bugs": False,
        "phases": (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
        "suppress_health_check": list(HealthCheck),
    }
    drawn = {f"rule {rule.function.__name__}": RULE_FLOOR for rule in here.setup_state().rules}
    missed: dict[str, int] = {}
    for _ in range(ROUNDS):
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(engine, "MAX_SHRINKING_SECONDS", SHRINKING_SECONDS)
            run_state_machine_as_test(here, settings=settings(**chosen))
        missed = {what: seen[what] for what, least in {**drawn, **floor}.items() if seen[what] < least}
        if not missed:
            break
    if "STEPWELL_SEEN" in os.environ:
        sys.stdout.write("".join(f"{count:6} {what}\n" for what, count in sorted(seen.items())))
    assert not missed, f"the examples have hardly exercised {missed}"
