"""Enqueue a run for each row of a file: what `stepwell enqueue --from` does.

Rows are checked one by one before they go out, in chunks of a thousand, each a transaction of its own. So a bad
row keeps no good one out, memory stays small however long the file is, and whoever is interrupted has the rows
up to there: with a key field the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import psycopg

from outbox.client import Client
from outbox.codec import encode
from outbox.errors import PayloadError
from outbox.settings import Settings
from outbox.statements import key_text
from worker.cli.contracts import Contract
from worker.cli.mistakes import Failed, one_line, told
from worker.cli.row_files import CsvRows, JsonRows, Rejects, Row, Source

CHUNK = 1000


@dataclass(slots=True)
class Summary:
    """What became of the rows."""

    enqueued: int = 0
    duplicates: int = 0
    rejected: int = 0
    rejects_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        return asdict(self)


def enqueue_rows(
    source: Source,
    contract: Contract,
    client: Client,
    settings: Settings,
    *,
    key_field: str | None,
    options: Mapping[str, Any],
) -> Summary:
    """Enqueue the rows that fit and write the others to the file of rejects.

    Raises Mistake if the file cannot be read at all, Failed if the database goes away in the middle.
    """
    done = Summary()
    with source.opened() as rows, Rejects(rows) as rejects, _progress(rows) as show:
        if key_field is not None:
            rows.require_key(key_field)
        reading = iter(rows)
        while chunk := list(islice(reading, CHUNK)):
            inputs: list[Mapping[str, Any]] = []
            keys: dict[int, str | None] = {}
            for row in chunk:
                try:
                    given = _input_of(row, rows, contract, settings.max_payload_bytes)
                    keys[id(given)] = _key_of(row, rows, key_field, contract)
                    inputs.append(given)
                except PayloadError as error:
                    rejects.add(row, one_line(error))
            _send(client, contract.name, inputs, keys, options, done, resumable=key_field is not None)
            done.rejected = rejects.count
            show(done)
    if rejects.count:
        done.rejects_file = str(rejects.path)
    return done


def _send(
    client: Client,
    workflow: str,
    inputs: list[Mapping[str, Any]],
    keys: Mapping[int, str | None],
    options: Mapping[str, Any],
    done: Summary,
    *,
    resumable: bool,
) -> None:
    """Enqueue one chunk and count. `keys` are by the identity of the inputs."""
    try:
        for run in client.enqueue_many(
            workflow, inputs, key=lambda given: keys[id(given)], chunk=CHUNK, **options
        ):
            done.enqueued += run.created
            done.duplicates += not run.created
    except (psycopg.Error, KeyboardInterrupt) as error:
        known = told(error) if isinstance(error, Exception) else None
        reason = (
            known.sentence
            if known
            else "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else one_line(error)
        )
        hint = "the same command goes on from there" if resumable else "the rows after them are not"
        so_far = f"{done.enqueued + done.duplicates:,} rows are in, {hint}"
        raise Failed(f"{reason}; {so_far}") from error


def _input_of(row: Row, rows: CsvRows | JsonRows, contract: Contract, max_bytes: int) -> Mapping[str, Any]:
    """Return the input for a row that fits, checked in every way in which sending it could fail."""
    row.require_read()
    if isinstance(rows, CsvRows):
        given: Mapping[str, Any] = contract.of_cells(row.fields, row.where)
    else:
        given = contract.of_object(row.fields, row.where)
    encode(dict(given), where=row.where, max_bytes=max_bytes)
    return given


def _key_of(row: Row, rows: CsvRows | JsonRows, key_field: str | None, contract: Contract) -> str | None:
    if key_field is None:
        return None
    what = f"{row.where}, {'column' if isinstance(rows, CsvRows) else 'field'} {key_field}"
    found = row.fields.get(key_field)
    if found is None and contract.rules is not None and len(contract.rules.parameters) == 1:
        inner = row.fields.get(
            contract.rules.parameters[0]
        )  # the row is the whole input: {"lead": {"id": 17}}
        found = inner.get(key_field) if isinstance(inner, Mapping) else None
    if isinstance(found, str):
        found = found.strip()
    if found is None or found == "":
        raise PayloadError(f"{what}: is empty, and it is to be the key")
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise PayloadError(f"{what}: cannot be the key, which is a text or a whole number")
    try:
        return key_text(found)
    except PayloadError as error:
        raise PayloadError(f"{what}: {error}") from None


@contextmanager
def _progress(rows: CsvRows | JsonRows) -> Iterator[Any]:
    """Yield a function that shows how far we are: on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        read = rows.text.buffer
        task = bar.add_task("", total=max(1, os.fstat(rows.text.fileno()).st_size))

        def show(done: Summary) -> None:
            said = f"{done.enqueued:,} enqueued, {done.duplicates:,} duplicates, {done.rejected:,} rejected"
            bar.update(task, completed=read.tell(), description=said)

        yield show
