"""What executes: define workflows and steps, and run them on N processes.

::

    from worker import retrying, step, transaction, workflow

A workflow is a plain function and the plan; a step is a function with effects, executed and recorded.
"""

from outbox.errors import Cancelled, Permanent, RetryAfter, StepFailed
from worker import events
from worker.context import StepInfo, current_run, current_step, now, random, sleep, sleep_until, uuid, wait
from worker.definitions import NOT_DONE, Step, Workflow, step, transaction, workflow
from worker.events import on_event
from worker.evolving import continue_as, patched, retire_patch, start
from worker.exchange import emit, progress, set_state, wait_signal
from worker.parallel import call, first, gather, map
from worker.replay.calls import First
from worker.replay.records import RunFacts
from worker.retries import RetryPolicy, retrying

__all__ = [
    "NOT_DONE",
    "Cancelled",
    "First",
    "Permanent",
    "RetryAfter",
    "RetryPolicy",
    "RunFacts",
    "Step",
    "StepFailed",
    "StepInfo",
    "Workflow",
    "call",
    "continue_as",
    "current_run",
    "current_step",
    "emit",
    "events",
    "first",
    "gather",
    "map",
    "now",
    "on_event",
    "patched",
    "progress",
    "random",
    "retire_patch",
    "retrying",
    "set_state",
    "sleep",
    "sleep_until",
    "start",
    "step",
    "transaction",
    "uuid",
    "wait",
    "wait_signal",
    "workflow",
]
