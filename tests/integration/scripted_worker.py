"""A child for the supervisor's tests: claims like an engine and then behaves as its APP says. No engine in it.

APP is "behaviour" or "behaviour:directory"; the directory lets it remember its earlier lives.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from outbox.database import connect
from worker.engine.vitals import Vitals
from worker.supervision.pipe import (
    DEAD,
    EXIT_CONFIG,
    EXIT_DECLARED_DEAD,
    FD_VARIABLE,
    Briefing,
    ChildPipe,
    beat_line,
    complaint_line,
)

EVERY_SECONDS = 0.05


@dataclass
class Life:
    """One process."""

    pipe: ChildPipe
    briefing: Briefing
    terminations: int = 0

    def work(self, behaviour: str) -> None:
        self.claim()
        vitals = Vitals(loop=1, flushes=0, pending=0, connected=True, claiming=True, in_flight=1)
        if behaviour == "stuck":
            vitals = replace(vitals, pending=5)
        self.pipe.send(beat_line(vitals))
        while not self.terminations or (behaviour == "stubborn"):
            time.sleep(EVERY_SECONDS)
            if behaviour != "mute":
                vitals = replace(vitals, loop=vitals.loop + 1)
                self.pipe.send(beat_line(vitals))

    def claim(self) -> None:
        me = self.briefing.worker_id
        with connect(self.briefing.url, application_name=f"stepwell {me}") as db:
            db.execute(
                "select stepwell.register_v1(%s, %s, 'here', %s, '', %s, array['w'])",
                [me, self.briefing.supervisor_id, os.getpid(), list(self.briefing.queues)],
            )
            db.execute(
                "select * from stepwell.claim_v1(%s, 'default', array['w'], 10, array_fill(0, array[20])::bigint[])",
                [me],
            )

    def leave(self) -> None:
        """Give everything back, as a drained engine does."""
        me = self.briefing.worker_id
        with connect(self.briefing.url, application_name=f"stepwell {me}") as db:
            db.execute(
                "update stepwell.tasks set state = 'ready', claimed_by = null where claimed_by = %s", [me]
            )
            db.execute("delete from stepwell.workers where id = %s", [me])

    def hear(self, line: bytes) -> None:
        if line == DEAD:
            os._exit(EXIT_DECLARED_DEAD)

    def on_sigterm(self, *_: object) -> None:
        self.terminations += 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = ChildPipe.inherited(int(os.environ.pop(FD_VARIABLE)))
    line = pipe.receive()
    if line is None:
        orphaned()
    life = Life(pipe, Briefing.from_line(line))
    signal.signal(signal.SIGTERM, life.on_sigterm)
    threading.Thread(target=pipe.listen, args=(life.hear, orphaned), daemon=True).start()
    behaviour, _, directory = life.briefing.app.partition(":")
    lives = remember(Path(directory)) if directory else 1
    match behaviour:
        case "misconfigured":
            return complain(pipe)
        case "misconfigured later" if lives > 1:
            return complain(pipe)
        case "crash":
            return 1
        case "declared dead" if lives == 1:
            return EXIT_DECLARED_DEAD
        case _:
            life.work(behaviour)
            life.leave()
            return 0


def complain(pipe: ChildPipe) -> int:
    pipe.send(complaint_line("the app defines no workflow"))
    return EXIT_CONFIG


def remember(directory: Path) -> int:
    """Note one more life; return how many there have been."""
    (directory / f"life-{os.getpid()}-{time.monotonic_ns()}").touch()
    return len(list(directory.iterdir()))


def orphaned() -> NoReturn:
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
