"""What executes: define workflows and steps, and run them on N processes.

::

    from worker import retrying, step, transaction, workflow

A workflow is a plain function and the plan; a step is a function with effects, executed and recorded.
"""

from outbox.errors import Cancelled, Permanent, RetryAfter, StepFailed
from worker.context import StepInfo, current_run, current_step, now, random, sleep, sleep_until, uuid, wait
from worker.definitions import NOT_DONE, Step, Workflow, step, transaction, workflow
from worker.replay.records import RunFacts
from worker.retries import RetryPolicy, retrying

__all__ = [
    "NOT_DONE",
    "Cancelled",
    "Permanent",
    "RetryAfter",
    "RetryPolicy",
    "RunFacts",
    "Step",
    "StepFailed",
    "StepInfo",
    "Workflow",
    "current_run",
    "current_step",
    "now",
    "random",
    "retrying",
    "sleep",
    "sleep_until",
    "step",
    "transaction",
    "uuid",
    "wait",
    "workflow",
]
