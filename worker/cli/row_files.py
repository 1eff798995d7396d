"""Read rows from a .csv or .jsonl file, one at a time, and write the rejected ones to a file beside it.

A file of any size is streamed, and a row that cannot be read is one rejected row, not the end of the file. In
CSV that takes care: an opening quote that is never closed would swallow all lines after it, so what it took is
given back and only its first line is rejected.

Rejects are the rows as they came, with the reason added last (a column, a field), so that they can be
mended and enqueued from that very file: a `reason` at the end of a .rejects file is not read.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from outbox.errors import PayloadError
from worker.cli.mistakes import Mistake

REASON = "reason"
_DELIMITERS = ",;\t"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LONGEST_CELL = 2 * 1024 * 1024  # an opening quote that is not closed within so many characters was a slip


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its fields by name, or the reason why it could not be read. `raw` is what a reject repeats."""

    where: str
    fields: Mapping[Any, Any]
    raw: Any
    problem: str | None = None

    def require_read(self) -> None:
        """Raise PayloadError if the row could not be read."""
        if self.problem is not None:
            raise PayloadError(f"{self.where}: {self.problem}")


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows."""

    path: Path
    is_csv: bool

    @classmethod
    def of(cls, path: Path) -> Source:
        """Return the source, told by the ending of its name. Raises Mistake for any other than the two."""
        ending = path.suffix.lower()
        if ending not in (".csv", ".jsonl", ".ndjson"):
            raise Mistake(f"cannot tell what {path} holds: its name must end in .csv or .jsonl")
        return cls(path, ending == ".csv")

    @property
    def rejects(self) -> Path:
        """Where rejected rows go."""
        return self.path.with_name(f"{self.path.name}.rejects{'.csv' if self.is_csv else '.jsonl'}")

    @property
    def holds_rejects(self) -> bool:
        """Whether the rows were rejected before, and carry the reason."""
        return self.path.stem.endswith(".rejects")

    @contextmanager
    def opened(self) -> Iterator[CsvRows | JsonRows]:
        """Yield the rows. Raises Mistake if the file cannot be read."""
        try:
            binary = self.path.open("rb")
        except OSError as error:
            raise Mistake(f"cannot read {self.path}: {error.strerror}") from None
        if binary.peek(2)[:2] in _UTF16:
            binary.close()
            raise Mistake(f"{self.path} is UTF-16: save it as UTF-8")
        # Bytes that are not UTF-8 become lone surrogates: that row is rejected, and repeated as it was.
        newline = "" if self.is_csv else "\n"
        with io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline=newline) as text:
            yield CsvRows(self, text) if self.is_csv else JsonRows(self, text)


class _Lines:
    """The lines of a text, which can be given back up to the last mark."""

    def __init__(self, text: Iterator[str]) -> None:
        self._text = text
        self._returned: deque[str] = deque()
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._text)
        self.taken.append(line)
        self.number += 1
        return line

    def mark(self) -> None:
        """Forget what was taken: it will not be given back."""
        self.taken = []

    def give_back_all_but_first(self) -> str:
        """Give back what was taken since the mark but for the first line, and return that."""
        first, *rest = self.taken
        self._returned.extendleft(reversed(rest))
        self.number -= len(rest)
        self.mark()
        return first


@dataclass
class CsvRows:
    """The rows of a CSV file below its header. The delimiter is what separates the header: comma, semicolon, tab."""

    source: Source
    text: TextIO
    header: list[str] = field(init=False)

    def __post_init__(self) -> None:
        csv.field_size_limit(_LONGEST_CELL)
        self._lines = _Lines(iter(self.text))
        first = next(self._lines, "")
        self._delimiter = max(_DELIMITERS, key=first.count)
        self.header = [name.strip() for name in next(csv.reader([first], delimiter=self._delimiter), [])]
        if not any(self.header):
            raise Mistake(f"{self.source.path} has no header: its first line must name the columns")
        twice = [name for at, name in enumerate(self.header) if name in self.header[:at]]
        if twice:
            raise Mistake(f"{self.source.path} has two columns called {twice[0]!r}")
        if self.source.holds_rejects and self.header[-1] == REASON:
            del self.header[-1]
        self._columns = len(self.header)

    def require_key(self, name: str) -> None:
        """Raise Mistake if there is no such column."""
        if name not in self.header:
            raise Mistake(
                f"{self.source.path} has no column {name!r}; its columns are {', '.join(self.header)}"
            )

    def __iter__(self) -> Iterator[Row]:
        self._lines.mark()
        reader = csv.reader(self._lines, delimiter=self._delimiter, strict=True)
        while True:
            number = self._lines.number + 1
            where = f"line {number}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                first = self._lines.give_back_all_but_first()
                reader = csv.reader(self._lines, delimiter=self._delimiter, strict=True)
                yield Row(where, {}, [first.rstrip("\r\n")], f"is not valid CSV: {error}")
                continue
            self._lines.mark()
            if cells:
                yield self._row(where, cells)

    def _row(self, where: str, cells: list[str]) -> Row:
        if self.source.holds_rejects and len(cells) == self._columns + 1:
            del cells[-1]
        if len(cells) > self._columns:
            return Row(where, {}, cells, f"has {len(cells)} cells for {self._columns} columns")
        broken = next(
            (name for name, cell in zip(self.header, cells, strict=False) if not _is_utf8(cell)), None
        )
        if broken is not None:
            return Row(where, {}, cells, f"column {broken} is not UTF-8")
        missing = [None] * (self._columns - len(cells))
        return Row(where, dict(zip(self.header, [*cells, *missing], strict=True)), cells)

    def rejected(self, row: Row, reason: str) -> list[str]:
        """Return the cells of a rejected row."""
        return [*row.raw, *[""] * (self._columns - len(row.raw)), reason]


@dataclass
class JsonRows:
    """The rows of a file with one JSON object in each line."""

    source: Source
    text: TextIO

    def require_key(self, name: str) -> None:
        """Do nothing: each row has fields of its own."""

    def __iter__(self) -> Iterator[Row]:
        for number, line in enumerate(self.text, 1):
            if line.strip():
                yield self._row(f"line {number}", line.rstrip("\r\n"))

    def _row(self, where: str, line: str) -> Row:
        if not _is_utf8(line):
            return Row(where, {}, line, "is not UTF-8")
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            said = f"{error.msg[:1].lower()}{error.msg[1:]}"
            return Row(where, {}, line, f"is not valid JSON: {said} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            return Row(where, {}, line, f"is not valid JSON: {error}")
        if not isinstance(found, dict):
            return Row(where, {}, line, "is not a JSON object")
        if self.source.holds_rejects:
            found.pop(REASON, None)
        return Row(where, found, found)

    def rejected(self, row: Row, reason: str) -> dict[str, Any]:
        """Return the object for a rejected row; a line that could not be read stands in `line`."""
        content = row.raw if isinstance(row.raw, dict) else {"line": row.raw}
        return {**content, REASON: reason}


class Rejects:
    """The file of rejected rows: made with the first of them, removed at the start as a former run's."""

    def __init__(self, rows: CsvRows | JsonRows) -> None:
        self._rows = rows
        self._file: TextIO | None = None
        self.path = rows.source.rejects
        self.count = 0

    def add(self, row: Row, reason: str) -> None:
        """Write one row down. Raises Mistake if that cannot be done."""
        try:
            if self._file is None:
                self._file = self._created()
            if isinstance(self._rows, CsvRows):
                csv.writer(self._file).writerow(self._rows.rejected(row, reason))
            else:
                self._file.write(_json_line(self._rows.rejected(row, reason)))
        except OSError as error:
            raise Mistake(f"cannot write {self.path}: {error.strerror}") from None
        self.count += 1

    def _created(self) -> TextIO:
        file = self.path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        if isinstance(self._rows, CsvRows):
            csv.writer(file).writerow([*self._rows.header, REASON])
        return file

    def __enter__(self) -> Self:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise Mistake(f"cannot replace {self.path}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _json_line(content: dict[str, Any]) -> str:
    line = json.dumps(content, ensure_ascii=False)
    return (line if _is_utf8(line) else json.dumps(content)) + "\n"


def _is_utf8(text: str) -> bool:
    """Tell whether `text` came from valid UTF-8 (without lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
