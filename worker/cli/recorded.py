"""Recorded runs from and to an exported file, one after the other: any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from worker.cli.mistakes import Mistake, one_line
from worker.replay.rehearsal import RecordedRun

_LINE = msgspec.json.Decoder(RecordedRun)


def from_file(file: Path) -> Iterator[RecordedRun]:
    """Yield the runs of an export. Raises Mistake naming the line of one that cannot be read."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _LINE.decode(line.decode())  # msgspec does not look into what it leaves raw
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    why = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
                    raise Mistake(
                        f"{file}, line {number}: this is no exported run ({why}); "
                        "write the file with `stepwell runs export`"
                    ) from None


def to_file(runs: Iterable[RecordedRun], file: Path) -> int:
    """Write an export, which stands there whole or not at all; return how many runs it holds."""
    part = file.with_name(f"{file.name}.part")
    count = 0
    try:
        with part.open("wb") as out:
            for run in runs:
                out.write(line_of(run))
                count += 1
        part.replace(file)
    except OSError as error:
        raise Mistake(f"{file} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return count


def line_of(run: RecordedRun) -> bytes:
    """Return one line of an export. Who enqueues by SQL may have broken the lines of an input: there they are but space."""
    return msgspec.json.encode(run).replace(b"\r", b" ").replace(b"\n", b" ") + b"\n"
