"""The names that other people's code relies on: a change here is a change of the public API."""

from __future__ import annotations

import inspect
import typing

import outbox
import worker
from outbox import AsyncClient, AsyncRun, Client, Run

OUTBOX = {
    "AsyncClient", "AsyncRun", "Cancelled", "Client", "ConfigError", "DeadlineExceeded", "HistoryMismatch",
    "HistoryRecord", "NotDeterministic", "PayloadError", "Permanent", "Progress", "ResultTimeout", "RetryAfter", "Run",
    "RunBlocked", "RunCancelled", "RunConflict", "RunFailed", "RunInfo", "RunNotFound", "SchemaError", "Sealed", "Settings",
    "StepFailed", "StepwellError", "StreamItem", "Suspended", "TaskInfo", "UnknownWorkflow",
}  # fmt: skip

WORKER = {
    "Cancelled", "First", "NOT_DONE", "Permanent", "RetryAfter", "RetryPolicy", "RunFacts", "Step", "StepFailed",
    "StepInfo", "Workflow", "call", "continue_as", "current_run", "current_step", "emit", "events", "first",
    "gather", "map", "now", "on_event", "patched", "progress", "random", "retire_patch", "retrying", "set_state",
    "sleep", "sleep_until", "start", "step", "transaction", "uuid", "wait", "wait_signal", "workflow",
}  # fmt: skip

STEP_OPTIONS = "name, retry, timeout, on_crash, verify, raises, queue, undo"

OPTIONS = "queue, priority, delay, at, labels, deadline, lane, tenant, version, trace, tx"

CLIENT = {
    "cancel": "run, tx",
    "change": "action, runs",
    "close": "",
    "enqueue": f"workflow, args, key, {OPTIONS}, kwargs",
    "enqueue_many": f"workflow, inputs, key, {OPTIONS}, chunk",
    "find": "workflow, status, error_like, since, limit",
    "forget": "key, workflow",
    "fork": "run, path, input, version",
    "get": "run",
    "history": "run",
    "list": "workflow, status, limit, before",
    "pause": "run",
    "progress": "run",
    "resolve": "run, path, value, error",
    "result": "run, timeout, workflow",
    "resume": "run",
    "retry": "run",
    "rewind": "run, path",
    "signal": "run, name, payload, tx",
    "state": "run",
    "stream": "run, name, after, follow, timeout",
    "tasks": "run",
    "why": "run",
}

RUN = {
    "cancel": "",
    "fork": "path, input, version",
    "info": "",
    "pause": "",
    "progress": "",
    "resolve": "path, value, error",
    "result": "timeout",
    "resume": "",
    "retry": "",
    "rewind": "path",
    "signal": "name, payload, tx",
    "state": "",
    "stream": "name, after, follow, timeout",
}


def methods(cls: type) -> dict[str, str]:
    """Return the public methods of a class with the names of their parameters."""
    found = inspect.getmembers(cls, inspect.isfunction)
    return {
        name: ", ".join(list(inspect.signature(function).parameters)[1:])
        for name, function in found
        if not name.startswith("_")
    }


def test_outbox_exports_these_names() -> None:
    assert set(outbox.__all__) == OUTBOX
    assert sorted(outbox.__all__) == outbox.__all__
    assert all(hasattr(outbox, name) for name in OUTBOX)


def test_worker_exports_these_names() -> None:
    assert set(worker.__all__) == WORKER
    assert all(hasattr(worker, name) for name in WORKER)


def test_definitions_take_these_options() -> None:
    parameters = {name: set() for name in ("step", "transaction", "workflow")}
    for name, found in parameters.items():
        for overload in typing.get_overloads(getattr(worker, name)):
            found.update(set(inspect.signature(overload).parameters) - {"function"})
    assert parameters == {
        "step": set(STEP_OPTIONS.split(", ")),
        "transaction": set(STEP_OPTIONS.split(", ")) - {"verify"},
        "workflow": {"name", "queue", "strict", "version"},
    }
    assert list(inspect.signature(worker.retrying).parameters) == ["stop", "wait", "on"]


def test_every_error_that_users_meet_is_exported() -> None:
    ours = {
        name
        for name, value in vars(outbox.errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException) and not name.startswith("_")
    }
    assert ours <= OUTBOX


def test_both_clients_have_the_same_methods() -> None:
    assert methods(Client) == CLIENT
    assert methods(AsyncClient) == CLIENT


def test_both_handles_have_the_same_methods() -> None:
    assert methods(Run) == RUN
    assert methods(AsyncRun) == RUN


def test_what_the_sync_client_documents_the_async_one_refers_to() -> None:
    for name in CLIENT:
        assert inspect.getdoc(getattr(Client, name)), name
        assert inspect.getdoc(getattr(AsyncClient, name)), name
