"""The crash matrix: in every phase of a run, under every fault, for every kind of step and every policy.

The standing tier is a pairwise cover; `STEPWELL_MATRIX=full` plays the full product.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.crash import checker
from tests.crash.faults import MATRIX, Scene
from tests.crash.fleet import ROOT, Fleet
from tests.crash.ledger import Ledger
from tests.crash.matrix import KINDS, PHASES, PLANS, POLICIES, Cell, cells, cover, play
from tests.crash.proxy import Proxy
from tests.postgres import Cluster

APP = ROOT / "tests" / "crash" / "matrix_flows.py"
POSSIBLE = cells()
STANDING = cover(POSSIBLE)
PLAYED = POSSIBLE if os.environ.get("STEPWELL_MATRIX") == "full" else STANDING
SETTINGS = {
    "concurrency": 2,  # so that the steps of a join are on several workers
    "beat_seconds": 0.5,
    "lost_lock_seconds": 1.0,
    "lease_seconds": 3.0,
    "stopped_after_seconds": 0.75,
    "grace_seconds": 20.0,
    "poison_after": 10_000,
}


class Theatre:
    """A scene that many cells are played on, one after the other; one that a cell has failed on is torn down."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self._cluster = cluster
        self._home = home
        self._number = 0
        self._stack = ExitStack()
        self._scene: Scene | None = None

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        scene = self._scene = self._scene or self._built()
        try:
            scene.replenish()
            yield scene
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._scene = None
        self._stack.close()

    def _built(self) -> Scene:
        self._number += 1
        home = self._home / str(self._number)
        home.mkdir()
        ledger = self._stack.enter_context(Ledger(home / "facts"))
        url = self._stack.enter_context(self._cluster.database())
        proxy = self._stack.enter_context(Proxy(self._cluster))
        fleet = Fleet(
            url, home, app=APP, workers_url=proxy.url(urlsplit(url).path[1:]), metrics=True,
            environment=ledger.environment, **SETTINGS,
        )  # fmt: skip
        self._stack.callback(fleet.stop)
        checker.install(fleet.db)
        return Scene(self._cluster, fleet, proxy, ledger)


@pytest.fixture(scope="module")
def theatre(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    opened = Theatre(cluster, tmp_path_factory.mktemp("matrix"))
    try:
        yield opened
    finally:
        cluster.thaw()  # a cell that failed may have left it frozen
        opened.close()


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize("cell", PLAYED, ids=str)
def test_nothing_is_lost_stuck_or_repeated_and_no_stale_write_accepted(theatre: Theatre, cell: Cell) -> None:
    with theatre.scene() as scene:
        verdict = play(scene, cell)
        assert verdict.clean, str(verdict)
        assert verdict.blocked == 0, str(verdict)


def test_the_standing_cells_have_every_pair_of_values_that_is_possible() -> None:
    def pairs(chosen: list[Cell]) -> set[object]:
        return {
            pair
            for each in chosen
            for pair in combinations([each.phase, each.fault, each.kind, each.policy], 2)
        }

    assert pairs(STANDING) == pairs(POSSIBLE)
    assert len(STANDING) <= 150
    assert {each.phase for each in STANDING} == set(PHASES)
    assert {each.fault for each in STANDING} == set(MATRIX)
    assert {(each.kind, each.policy) for each in STANDING} == {
        (kind, policy)
        for kind in KINDS
        for policy in POLICIES
        if policy == "retry" or not kind.startswith("transactional")
    }


@pytest.mark.crash
@pytest.mark.parametrize("shape", ["plain", "join"])
@pytest.mark.parametrize("kind", ["transactional", "transactional_async"])
def test_a_commit_that_never_came_is_not_taken_for_one_whose_answer_was_lost(
    theatre: Theatre, kind: str, shape: str
) -> None:
    """The flush that asks about the first transaction is applied, too, without an answer, and sent again."""
    with theatre.scene() as scene:
        commits = scene.proxy.arm("commit_step_v1", "cut_before")
        asks = scene.proxy.arm("flush_v1", "cut_after", request=b'"move"')
        run = scene.fleet.enqueue("trip", tag=f"asked-{kind}-{shape}", variant=f"{kind}_retry", shape=shape)
        commits.wait()
        asks.wait()
        scene.fleet.wait_for(run, "succeeded")
        verdict = checker.check(scene.fleet.db, scene.ledger.facts(), enqueued=[run], plans=PLANS)
        assert verdict.clean, str(verdict)
