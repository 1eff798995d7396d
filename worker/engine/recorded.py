"""Recorded runs from the database, one after the other: any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time
from typing import Any
from uuid import UUID

import msgspec
import psycopg

from outbox.codec import decode
from worker.engine.claims import record_of
from worker.queries import load
from worker.replay.rehearsal import RecordedCall, RecordedRun

_PAGE = 200
_LOWEST = UUID(int=0)


def from_database(
    connection: psycopg.Connection[Any],
    *,
    ids: Sequence[UUID] | None = None,
    since: float | None = None,
    workflow: str | None = None,
) -> Iterator[RecordedRun]:
    """Yield the runs with these ids, else those enqueued in the last `since` seconds, else those that have not ended.

    Page by page, each in a transaction of its own: a long export holds nothing open.
    """
    # An id begins with the milliseconds of its time.
    first = None if since is None else UUID(int=max(0, int((time() - since) * 1000)) << 80)
    after = _LOWEST
    while True:
        page = connection.execute(
            load("recorded_runs"),
            {"ids": ids, "first": first, "workflow": workflow, "after": after, "limit": _PAGE},
        ).fetchall()
        if not page:
            return
        after = page[-1][0]
        yield from _with_histories(connection, page)


def _with_histories(
    connection: psycopg.Connection[Any], page: Sequence[tuple[Any, ...]]
) -> Iterator[RecordedRun]:
    histories: dict[UUID, list[RecordedCall]] = {row[0]: [] for row in page}
    for run, *record in connection.execute(load("history"), (list(histories),)):
        histories[run].append(RecordedCall.of(record_of(record)))
    for run, workflow, version, state, created_at, epoch, key_epoch, seed, labels, given in page:
        yield RecordedRun(
            id=run,
            workflow=workflow,
            version=version,
            state=state,
            created_at=created_at,
            epoch=epoch,
            key_epoch=key_epoch,
            seed=seed,
            labels={} if labels is None else decode(labels, dict[str, Any], where=f"the labels of run {run}"),
            input=msgspec.Raw(given.encode()),
            history=histories[run],
        )
