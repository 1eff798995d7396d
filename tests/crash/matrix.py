"""The crash matrix: in which phase a run is, which fault strikes, which kind of step with which policy it concerns.

`cells` are all that are possible; `cover` chooses as few as it takes for every pair of values to occur. `play` plays one
cell on a running scene: bring a run into the phase, strike, let it go on, heal, wait for the end, and have everything
compared.
"""

from __future__ import annotations

import itertools
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg.types.json import Json

from tests.crash import faults
from tests.crash.checker import Plan, Verdict, check
from tests.crash.faults import Aim, FreezeTree, Scene
from tests.crash.fleet import Held
from tests.crash.proxy import Trap
from tests.waiting import wait_until

PHASES = (
    "claimed", "running", "effect", "unacknowledged", "retry", "timer", "signal", "child", "join", "before_write",
    "after_write", "drain",
)  # fmt: skip
KINDS = ("sync", "async", "transactional", "transactional_async")
POLICIES = ("retry", "verify", "hold")
EXECUTING = ("running", "effect", "child", "join", "before_write", "after_write", "drain")
"""The phases in which an execution of the tested step is under way when the fault strikes."""
NO_REQUEST = ("claimed", "unacknowledged")
"""The phases in which the server has done what the victim waits for: it cannot be kept from it any more."""
KILLS = ("kill_child", "kill_tree", "stop_child")
END_SECONDS = 90.0
FENCED = "stepwell_fenced_writes_total"


@dataclass(frozen=True)
class Cell:
    """One combination."""

    phase: str
    fault: str
    kind: str
    policy: str

    @property
    def variant(self) -> str:
        """The name of the step."""
        return f"{self.kind}_{self.policy}"

    @property
    def transactional(self) -> bool:
        return self.kind.startswith("transactional")

    @property
    def possible(self) -> bool:
        if self.transactional and self.policy != "retry":
            return (
                False  # its effects and its record are one: there is nothing to verify, and nothing to hold
            )
        if self.phase in NO_REQUEST and self.fault == "cut_before":
            return False
        if self.phase in ("before_write", "after_write"):
            return self.transactional
        return not (self.phase in ("running", "effect") and self.transactional)

    @property
    def interrupts(self) -> bool:
        """Whether an execution of the tested step ends without an answer."""
        return self.phase in EXECUTING and faults.MATRIX[self.fault].interrupts

    @property
    def blocks(self) -> bool:
        """Whether a person has to say that the step may be executed again."""
        return self.policy == "hold" and self.interrupts

    @property
    def fences(self) -> bool:
        """Whether a worker comes back with something that it has done and may not write any more."""
        return self.fault == "freeze_tree" and self.phase in EXECUTING

    def __str__(self) -> str:
        return f"{self.phase}-{self.fault}-{self.variant}"


def cells() -> list[Cell]:
    """Return all that are possible."""
    combined = itertools.product(PHASES, faults.MATRIX, KINDS, POLICIES)
    return [cell for values in combined if (cell := Cell(*values)).possible]


def cover(candidates: list[Cell]) -> list[Cell]:
    """Return a choice in which every pair of values occurs that occurs at all, the most of new ones first."""
    pairs = {cell: frozenset(itertools.combinations(enumerate(astuple(cell)), 2)) for cell in candidates}
    missing = set().union(*pairs.values())
    chosen: list[Cell] = []
    while missing:
        best = max(candidates, key=lambda cell: len(pairs[cell] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen, key=candidates.index)


# -- one cell


@dataclass
class Stage:
    """A run that has come to the phase.

    `worked` is the run that the tested step belongs to, a child or the run itself; `held` is the answer that the proxy
    keeps from the victim. `before` are the workers that there were, and `counted` the refused writes.
    """

    cell: Cell
    run: UUID
    worked: UUID
    victim: Held
    aim: Aim
    before: list[Held]
    counted: float
    gates: tuple[str, ...] = ()
    held: Trap | None = None


def play(scene: Scene, cell: Cell) -> Verdict:
    """Play a cell; fail when the fault has not hit, or the run went on otherwise than its policy says."""
    refused = scene.fenced()
    stage = _set(scene, cell)
    fault = faults.MATRIX[cell.fault]()
    try:
        if stage.held is not None and cell.fault == "cut_after":
            stage.held.release(cut=True)
        else:
            fault.strike(scene, stage.victim, stage.aim)
        if stage.held is not None:
            stage.held.release()
        _open(scene, stage.gates)
        if cell.fault != "freeze_postgres":
            _wake(scene, stage)
        if isinstance(fault, FreezeTree):
            fault.wake_workers(scene)
            if cell.fences:
                wait_until(lambda: scene.fenced() > refused, what="the stale write to be refused")
        elif isinstance(fault, faults.Cut) and fault.trap is not None:
            fault.trap.wait()
    finally:
        _open(scene, stage.gates)
        fault.heal(scene, stage.victim)
    if cell.fault == "freeze_postgres":
        _wake(scene, stage)
    _end(scene, stage)
    scene.replenish()
    facts = scene.ledger.facts()
    verdict = check(scene.fleet.db, facts, enqueued=[stage.run], plans=PLANS, fenced=scene.fenced() - refused)
    _compare(scene, stage, Effects.of(facts, stage), verdict)
    return verdict


def _planned(given: dict[str, Any]) -> list[str]:
    shape, variant = given["shape"], given["variant"]
    own = {"child": [], "join": [variant] * 3, "between": ["opening", variant]}.get(shape, [variant])
    return [*own, "closing"]


PLANS: dict[str, Plan] = {"trip": _planned, "errand": lambda given: [given["variant"]]}
SHAPES = {"claimed": "plain", "unacknowledged": "plain", "timer": "timer", "signal": "signal", "child": "child", "join": "join"}  # fmt: skip


def _set(scene: Scene, cell: Cell) -> Stage:
    """Bring a run into the phase."""
    home = scene.fleet.home
    tag = uuid.uuid4().hex[:12]
    before = scene.workers()
    counted = scene.counted(FENCED) if cell.fences else 0.0
    gate = {"effect": "after", "unacknowledged": "after", "after_write": "after"}.get(cell.phase, "before")
    names = [f"{tag}-{number}" for number in range(3)] if cell.phase == "join" else [tag]
    gates = tuple(f"{gate}-{name}" for name in names) if cell.phase in (*EXECUTING, "unacknowledged") else ()
    for each in gates:
        (home / f"closed-{each}").touch()
    if cell.phase == "retry":
        (home / f"fails-{tag}").touch()
    if cell.phase == "claimed":
        run, held = _claimed(scene, tag, cell)
    else:
        run, held = _enqueued(scene, tag, cell), None
    for each in gates:
        scene.fleet.reached(each)
    stage = Stage(cell, run, run, before[0], Aim(request=str(run).encode()), before, counted, gates, held)
    _arrive(scene, stage)
    return stage


def _enqueued(scene: Scene, tag: str, cell: Cell) -> UUID:
    given = {"tag": tag, "variant": cell.variant, "shape": SHAPES.get(cell.phase, "between")}
    row = scene.fleet.db.execute("select stepwell.enqueue('trip', %s)", (Json(given),)).fetchone()
    assert row is not None
    run: UUID = row[0]
    return run


def _claimed(scene: Scene, tag: str, cell: Cell) -> tuple[UUID, Trap]:
    """Enqueue a run and keep the answer to its claim from the claimant.

    A claim that was under way already as the trap was set may take the run: then it is another run's turn.
    """
    while True:
        with scene.fleet.db.transaction():
            run = _enqueued(scene, tag, cell)
            held = scene.proxy.arm("claim_v1", "hold_answer", answer=run.bytes)

        def over(run: UUID = run, held: Trap = held) -> bool:
            return held.times > 0 or scene.fleet.status(run) == "succeeded"

        wait_until(over, END_SECONDS, what="a claim")
        if held.times:
            return run, held
        held.release()


def _arrive(scene: Scene, stage: Stage) -> None:
    """Wait until the run is where it should be; find the victim."""
    run = stage.run
    match stage.cell.phase:
        case "claimed":
            assert stage.held is not None
            stage.victim = scene.fleet.holder(run)
        case "unacknowledged":
            stage.victim = scene.fleet.holder(run)
            stage.held = scene.proxy.arm("_v1", "hold_answer", request=str(run).encode())
            _open(scene, stage.gates)
            stage.held.wait()
            assert _recorded(scene, run, "completed"), "the record is there before its answer"
        case "retry" | "timer" | "signal":
            wanted = "failed" if stage.cell.phase == "retry" else "completed"
            wait_until(
                lambda: _recorded(scene, run, wanted) and scene.fleet.status(run) == "waiting",
                what="the run to park",
            )
            stage.victim = faults.last_worker(scene, [run])
            stage.aim = Aim("claim_v1", answer=run.bytes if stage.cell.fault == "cut_after" else b"")
        case "child":
            row = scene.fleet.db.execute(
                "select id from stepwell.runs where parent_id = %s", (run,)
            ).fetchone()
            assert row is not None
            stage.worked = row[0]
            stage.victim = scene.fleet.holder(stage.worked)
            stage.aim = Aim(request=str(stage.worked).encode())
        case "join":
            holders = _holders(scene, run)
            assert len(holders) > 1, "the steps of a join are on several workers"
            stage.victim = holders[0]
        case "drain":
            stage.victim = scene.fleet.holder(run)
            said = _draining(scene)
            os.kill(stage.victim.supervisor_pid, signal.SIGTERM)
            wait_until(lambda: _draining(scene) > said, what="the supervisor to drain")
        case _:
            stage.victim = scene.fleet.holder(run)


def _holders(scene: Scene, run: UUID) -> list[Held]:
    """Return the workers that execute steps of a run, each once."""
    rows = scene.fleet.db.execute(
        "select distinct claimed_by from stepwell.tasks where run_id = %s and kind = 'step'", (run,)
    ).fetchall()
    return [each for each in scene.workers() if (each.worker,) in rows]


def _recorded(scene: Scene, run: UUID, outcome: str) -> bool:
    return any(found == outcome for name, _, found in scene.fleet.history(run) if name != "opening")


def _draining(scene: Scene) -> int:
    logs = Path(scene.fleet.home).glob("supervisor-*.log")
    return sum(log.read_text(errors="replace").count(": draining;") for log in logs)


def _open(scene: Scene, gates: Iterable[str]) -> None:
    for gate in gates:
        (scene.fleet.home / f"closed-{gate}").unlink(missing_ok=True)


def _wake(scene: Scene, stage: Stage) -> None:
    """Have come what the run waits for in its phase."""
    match stage.cell.phase:
        case "signal":
            scene.fleet.db.execute("select stepwell.signal(%s, 'go', '\"on\"')", (stage.run,))
        case "retry" | "timer":
            scene.fleet.db.execute(
                "update stepwell.tasks set due_at = clock_timestamp() where run_id = %s and state = 'waiting'",
                (stage.run,),
            )


def _end(scene: Scene, stage: Stage) -> None:
    """Wait until the run has ended; where its policy says so, let a person have it go on."""
    blocked = 0

    def over() -> bool:
        nonlocal blocked
        family = scene.fleet.db.execute(
            "select id, state, error ->> 'message' from stepwell.runs where id = %(run)s or parent_id = %(run)s",
            {"run": stage.run},
        ).fetchall()
        for run, state, message in family:
            if state == "blocked":
                assert stage.cell.policy == "hold", message
                blocked += 1
                scene.fleet.db.execute("select stepwell.retry(%s)", (run,))
        return all(state == "succeeded" for _, state, _ in family)

    wait_until(over, END_SECONDS, what="the run to succeed")
    assert (blocked > 0) == stage.cell.blocks, f"the run was blocked {blocked} times"


# -- what a cell may have left


@dataclass(frozen=True)
class Effects:
    """What the ledger says of the tested step: each call with how often it began and took effect."""

    starts: Counter[str]
    effects: Counter[str]

    @classmethod
    def of(cls, facts: Iterable[Any], stage: Stage) -> Effects:
        said = [fact for fact in facts if fact.step == stage.cell.variant and fact.run == str(stage.worked)]
        return cls(
            Counter(fact.key for fact in said if fact.what == "start"),
            Counter(fact.key for fact in said if fact.what == "effect"),
        )


def _compare(scene: Scene, stage: Stage, said: Effects, verdict: Verdict) -> None:
    """Fail when the fault has not hit as it should, or hit more than it should."""
    cell = stage.cell
    if faults.MATRIX[cell.fault].interrupts:
        # A victim that held nothing is found dead no sooner than any other, and the run does not wait for that.
        wait_until(
            lambda: not scene.knows(stage.victim.worker), END_SECONDS, what="the victim to be reclaimed"
        )
    elif cell.phase != "drain":
        gone = faults.reclaimed(scene, stage.before)
        assert gone == [], "nobody is taken for dead because of the network or the database"
        if not cell.transactional:
            assert set(said.effects.values()) == {1}, f"what nobody interrupted took effect once: {said}"
    if cell.interrupts:
        assert _recorded(scene, stage.worked, "interrupted"), "what was interrupted is recorded as such"
    if cell.policy == "verify" and cell.fault in KILLS:
        assert set(said.effects.values()) == {1}, f"what was verified took effect once: {said}"
    if cell.fences:
        assert verdict.fenced > 0
        if cell.phase != "drain":  # else the supervisor that has counted it is gone
            wait_until(lambda: scene.counted(FENCED) > stage.counted, what="the refusal to be counted")
