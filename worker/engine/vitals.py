"""What a worker process says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vitals:
    """The counters of one worker process; a beat carries them to the supervisor.

    `loop` grows with the engine's own loop, `flushes` with each flush that came back; `pending` transitions
    wait for one. `claiming` is true from registration until drain, `connected` while the database answers.
    """

    loop: int
    flushes: int
    pending: int
    connected: bool
    claiming: bool
    in_flight: int
