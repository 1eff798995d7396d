"""Read the demo's leads: from ``leads.csv``, and more of the same kind when more are asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from outbox.codec import Signature
from outbox.errors import PayloadError
from worker.demo.workflows import Lead

FILE_NAME = "leads.csv"
IDS_PER_ROUND = 100_000
"""More than any id in the file, so that the ids of one round through it meet none of the next."""

Cells = dict[str, Any]
"""One row as `csv.DictReader` gives it: a cell too few is None, cells too many are a list under None."""


@dataclass
class Intake:
    """What has become of the rows that were read so far."""

    rows: int = 0
    accepted: dict[int, Lead] = field(default_factory=dict)
    """The first row of each lead id."""
    duplicates: int = 0
    rejected: list[str] = field(default_factory=list)
    """Why, for each row that is no lead."""


def rows(count: int) -> Iterator[Cells]:
    """Yield `count` rows: those of the file, then the file again with new ids and addresses, and so on."""
    for start in range(0, count, _file_length()):
        round_number = start // _file_length()
        for cells, _ in zip(_file_rows(), range(count - start), strict=False):
            yield _renumbered(cells, round_number) if round_number else cells


def take_in(count: int, signature: Signature, intake: Intake) -> Iterator[Lead]:
    """Yield the lead of each row that is one, duplicates included; count all rows in `intake`.

    `signature` is that of a workflow whose one parameter is ``lead``.
    """
    for cells in rows(count):
        intake.rows += 1
        try:
            lead: Lead = signature.decode_row(cells, where=f"row {intake.rows}")["lead"]
        except PayloadError as error:
            intake.rejected.append(str(error))
            continue
        if lead.id in intake.accepted:
            intake.duplicates += 1
        else:
            intake.accepted[lead.id] = lead
        yield lead


def _file_rows() -> Iterator[Cells]:
    yield from csv.DictReader(io.StringIO((files("worker.demo") / FILE_NAME).read_text(encoding="utf-8")))


def _file_length() -> int:
    return sum(1 for _ in _file_rows())


def _renumbered(cells: Cells, round_number: int) -> Cells:
    """Return the row as another lead's. What was broken in it stays broken."""
    again = dict(cells)
    if again["id"].isdecimal():
        again["id"] = str(int(again["id"]) + round_number * IDS_PER_ROUND)
    if again["email"]:
        again["email"] = again["email"].replace("@", f"+{round_number}@")
    return again
