"""The faults: each strikes at a victim, a worker process, and is healed afterwards.

`strike` returns when the fault has done what makes it one: a process that is stopped past its time was found out by then,
a frozen tree's runs were taken from it. What lasts for a while has begun by then. `heal` has it last so long, and brings
back what would not come back by itself; it is safe when there is nothing to heal. Between the two lies whatever a test
wants to happen meanwhile.

`FAULTS` has them by name; the crash matrix uses those of `MATRIX`, a chaos run any.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from uuid import UUID

import psycopg

from tests.crash.fleet import Fleet, Held, children_of, parent_of
from tests.crash.ledger import Ledger
from tests.crash.proxy import Action, Proxy, Trap
from tests.postgres import Cluster
from tests.waiting import wait_until

NOTICED_SECONDS = 60.0
STARTED_SECONDS = 120.0
"""How long a fleet may take to come up on a machine that several of them start on at once."""
FROZEN_SECONDS = 1.2
"""How long Postgres or the network stands still: longer than a lock may be lost, shorter than a lease."""
FENCED = "its write was refused"


@dataclass(frozen=True)
class Aim:
    """Which request a cut is meant for: what it executes, contains, and what its answer contains."""

    statement: str = "_v1"
    request: bytes = b""
    answer: bytes = b""


@dataclass
class Scene:
    """Everything that faults strike at. The workers reach the server of `cluster` by way of `proxy`."""

    cluster: Cluster
    fleet: Fleet
    proxy: Proxy
    ledger: Ledger
    supervisors: int = 2
    processes: int = 2

    def workers(self) -> list[Held]:
        """Return the workers that the database holds for alive and whose processes live, under a supervisor of ours.

        What is left of a tree that was killed is init's for a moment, and nobody may strike at that.
        """
        found = []
        ours = {each.pid for each in self.fleet.living}
        for worker, pid in self.fleet.db.execute(
            "select id, pid from stepwell.workers where dead_at is null order by id"
        ).fetchall():
            with contextlib.suppress(OSError):
                if (parent := parent_of(pid)) in ours:
                    found.append(Held(pid, parent, worker))
        return found

    def siblings(self, victim: Held) -> list[Held]:
        """Return the workers of one supervisor."""
        return [each for each in self.workers() if each.supervisor_pid == victim.supervisor_pid]

    def knows(self, worker: int) -> bool:
        """Tell whether the database still has a row of this worker."""
        return (
            self.fleet.db.execute("select from stepwell.workers where id = %s", (worker,)).fetchone()
            is not None
        )

    def replenish(self) -> None:
        """Start the supervisors that are missing, also of those that are about to end; wait until every worker claims."""
        wanted = self.supervisors * self.processes

        def complete() -> bool:
            _start_missing(self)
            return len(self.workers()) == wanted and self.listening() >= wanted

        wait_until(complete, STARTED_SECONDS, what="all workers")

    def listening(self) -> int:
        """Return how many workers are connected and wait for a ring."""
        row = self.fleet.db.execute(
            "select count(*) from pg_stat_activity where datname = current_database() and query = 'listen stepwell'"
        ).fetchone()
        assert row is not None
        return int(row[0])

    def fenced(self) -> int:
        """Return how many writes were refused so far, by what the workers have logged."""
        logs = Path(self.fleet.home).glob("supervisor-*.log")
        return sum(len(re.findall(re.escape(FENCED), log.read_text(errors="replace"))) for log in logs)

    def counted(self, metric: str) -> float:
        """Return the sum of a metric without labels over the supervisors that live and serve metrics."""
        total = 0.0
        for log in Path(self.fleet.home).glob("supervisor-*.log"):
            for address in re.findall(r"serving (http://\S+)/metrics", log.read_text(errors="replace")):
                with contextlib.suppress(OSError):
                    said = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
                    total += sum(map(float, re.findall(rf"^{metric} (\S+)$", said, re.MULTILINE)))
        return total


class Fault:
    """Something that goes wrong. `interrupts`: what the victim executes has to be executed again.

    An object is used for one strike. `aim` is for those that strike at a request.
    """

    name: ClassVar[str]
    interrupts: ClassVar[bool] = False

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        raise NotImplementedError

    def heal(self, scene: Scene, victim: Held) -> None:
        """Bring back what does not come back by itself."""


# -- processes


class KillChild(Fault):
    name = "kill_child"
    interrupts = True

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        _signal(victim.pid, signal.SIGKILL)


class KillTree(Fault):
    name = "kill_tree"
    interrupts = True

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.fleet.kill_tree(victim.supervisor_pid)
        _reap(scene, victim)

    def heal(self, scene: Scene, victim: Held) -> None:
        _start_missing(scene)


class KillSupervisor(Fault):
    """Only the supervisor: its workers notice, and end by themselves."""

    name = "kill_supervisor"
    interrupts = True

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        children = children_of(victim.supervisor_pid)
        scene.fleet.signal_supervisor(victim.supervisor_pid, signal.SIGKILL)
        _reap(scene, victim)
        wait_until(lambda: not any(map(_runs, children)), NOTICED_SECONDS, what="the orphans to end")

    def heal(self, scene: Scene, victim: Held) -> None:
        _start_missing(scene)


class StopChild(Fault):
    """Stopped for longer than its supervisor puts up with, which kills it."""

    name = "stop_child"
    interrupts = True

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        _signal(victim.pid, signal.SIGSTOP)
        wait_until(lambda: not _runs(victim.pid), NOTICED_SECONDS, what="the stopped worker to be killed")


class FreezeTree(Fault):
    """The supervisor and its workers are stopped past the lease, and come back when their runs are elsewhere."""

    name = "freeze_tree"
    interrupts = True

    def __init__(self) -> None:
        self._frozen: list[Held] = []
        self._traps: list[Trap] = []

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        self._frozen = scene.siblings(victim)
        scene.fleet.signal_tree(victim.supervisor_pid, signal.SIGSTOP)
        wait_until(
            lambda: not any(scene.knows(each.worker) for each in self._frozen),
            NOTICED_SECONDS,
            what="the runs of the frozen workers to be reclaimed",
        )

    def wake_workers(self, scene: Scene) -> None:
        """Let the workers go on before they can learn that they were declared dead: they try to write what they have.

        They would learn it from their supervisor, which stays stopped, or at a claim, which waits in the proxy.
        """
        self._traps = [
            scene.proxy.arm("claim_v1", "hold", application=each.application, once=False)
            for each in self._frozen
        ]
        for each in self._frozen:
            _signal(each.pid, signal.SIGCONT)

    def heal(self, scene: Scene, victim: Held) -> None:
        scene.fleet.signal_tree(victim.supervisor_pid, signal.SIGCONT)
        for trap in self._traps:
            trap.release()


class Stutter(Fault):
    """The tree stands still for a moment, too short for anybody to take it for dead."""

    name = "stutter"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.fleet.signal_tree(victim.supervisor_pid, signal.SIGSTOP)

    def heal(self, scene: Scene, victim: Held) -> None:
        time.sleep(FROZEN_SECONDS / 2)  # the fault itself
        scene.fleet.signal_tree(victim.supervisor_pid, signal.SIGCONT)


class Drain(Fault):
    """A deploy: the supervisor is told to end, and another one started."""

    name = "drain"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.fleet.signal_supervisor(victim.supervisor_pid, signal.SIGTERM)

    def heal(self, scene: Scene, victim: Held) -> None:
        _reap(scene, victim)
        _start_missing(scene)


# -- the network


@dataclass
class Cut(Fault):
    """A connection is lost at a certain request. `strike` arms the trap; it springs when the request comes."""

    action: ClassVar[Action]
    trap: Trap | None = field(default=None, init=False)

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        self.trap = scene.proxy.arm(aim.statement, self.action, request=aim.request, answer=aim.answer)

    def heal(self, scene: Scene, victim: Held) -> None:
        if self.trap is not None:
            self.trap.release()


class CutBefore(Cut):
    """The server never sees the request."""

    name = "cut_before"
    action = "cut_before"


class CutAfter(Cut):
    """The server has done what was requested, and nobody learns."""

    name = "cut_after"
    action = "cut_after"


class CutAll(Fault):
    """Every connection is closed at once."""

    name = "cut_all"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.proxy.cut()


class Stall(Fault):
    """Nothing comes through for a while; nothing is lost."""

    name = "stall"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.proxy.freeze()

    def heal(self, scene: Scene, victim: Held) -> None:
        time.sleep(FROZEN_SECONDS)  # the fault itself
        scene.proxy.thaw()


class Blackhole(Fault):
    """Everything is swallowed in silence for a while."""

    name = "blackhole"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.proxy.blackhole()

    def heal(self, scene: Scene, victim: Held) -> None:
        time.sleep(FROZEN_SECONDS)  # the fault itself
        scene.proxy.restore()


# -- Postgres


class TerminateBackends(Fault):
    """An administrator ends all sessions of the victim."""

    name = "terminate"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.fleet.db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s",
            (victim.application,),
        )


class RestartPostgres(Fault):
    """The server aborts every session, and recovers as after a crash."""

    name = "restart"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.cluster.restart("immediate")
        scene.fleet.reconnect()


class FreezePostgres(Fault):
    """Every process of the server is stopped for a while."""

    name = "freeze_postgres"

    def strike(self, scene: Scene, victim: Held, aim: Aim = Aim()) -> None:
        scene.cluster.freeze()

    def heal(self, scene: Scene, victim: Held) -> None:
        time.sleep(FROZEN_SECONDS)  # the fault itself
        scene.cluster.thaw()


_MATRIX: tuple[type[Fault], ...] = (
    KillChild, KillTree, StopChild, FreezeTree, CutBefore, CutAfter, TerminateBackends, RestartPostgres,
    FreezePostgres,
)  # fmt: skip
_OTHERS: tuple[type[Fault], ...] = (KillSupervisor, Stutter, Drain, CutAll, Stall, Blackhole)

MATRIX: dict[str, type[Fault]] = {fault.name: fault for fault in _MATRIX}
FAULTS: dict[str, type[Fault]] = {fault.name: fault for fault in (*_MATRIX, *_OTHERS)}


# -- what they are made of


def last_worker(scene: Scene, runs: list[UUID]) -> Held:
    """Return the worker that has last executed something for one of the runs, or any other where it has gone."""
    wanted = {str(run) for run in runs}
    pids = [fact.pid for fact in scene.ledger.facts() if fact.run in wanted]
    workers = scene.workers()
    return next((each for pid in reversed(pids) for each in workers if each.pid == pid), workers[0])


def reclaimed(scene: Scene, before: list[Held]) -> list[Held]:
    """Return those of the workers whose rows have gone."""
    return [each for each in before if not scene.knows(each.worker)]


def survives(scene: Scene) -> bool:
    """Tell whether the database answers us, on a new connection if need be."""
    try:
        scene.fleet.db.execute("select 1")
    except psycopg.OperationalError:
        try:
            scene.fleet.reconnect()
        except psycopg.OperationalError:
            return False
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _runs(pid: int) -> bool:
    """Tell whether a process is there, and not only as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _reap(scene: Scene, victim: Held) -> None:
    """Wait for a supervisor of ours that has ended or is ending."""
    for each in scene.fleet.living:
        if each.pid == victim.supervisor_pid:
            each.wait(NOTICED_SECONDS * 2)


def _start_missing(scene: Scene) -> None:
    for _ in range(scene.supervisors - len(scene.fleet.living)):
        scene.fleet.start(scene.processes, claiming=False)
