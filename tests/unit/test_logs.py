"""Lines of JSON: one for each record, with the run and step of whoever logs, whatever it logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest

from tests.unit.drives import FACTS, Run
from worker.context import StepInfo, executing
from worker.definitions import collecting, step, workflow
from worker.telemetry.logs import JsonFormatter, Whereabouts, set_up_logs

STEP = StepInfo(FACTS.id, (3, 1, 2), 4, 2 << 48 | 5 << 24 | 9, name="pack")


class Said:
    """A logger, and what it has written."""

    def __init__(self) -> None:
        self._stream = StringIO()
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(JsonFormatter())
        handler.addFilter(Whereabouts(17))
        self.log = logging.getLogger(f"shop.{id(self)}")
        self.log.setLevel(logging.INFO)
        self.log.addHandler(handler)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    @property
    def line(self) -> dict[str, Any]:
        (line,) = self.lines
        return line


@pytest.fixture
def said() -> Said:
    return Said()


def test_a_line_says_when_where_and_what(said: Said) -> None:
    said.log.warning("packed %d of %s", 3, "seven")
    line = said.line
    assert line["timestamp"].endswith("+00:00")
    assert {name: line[name] for name in ("level", "logger", "message", "worker")} == {
        "level": "WARNING", "logger": said.log.name, "message": "packed 3 of seven", "worker": 17,
    }  # fmt: skip
    assert set(line) == {"timestamp", "level", "logger", "message", "process", "worker"}


def test_a_step_is_told_of(said: Said) -> None:
    with executing(FACTS, STEP):
        said.log.info("packing")
    told = {
        "run_id": str(FACTS.id), "workflow": FACTS.workflow, "step": "pack", "path": "3.1.2", "execution": 4, "attempt": 5,
    }  # fmt: skip
    assert told.items() <= said.line.items()


def test_a_body_is_told_of_as_its_run(said: Said) -> None:
    with collecting():

        @step
        async def pack() -> None: ...

        @workflow
        async def flow() -> None:
            said.log.info("about to pack")
            await pack()

    Run(flow).start()
    assert said.line["run_id"] == str(FACTS.id)
    assert "step" not in said.line


def test_what_is_added_to_a_record_is_in_its_line(said: Said) -> None:
    said.log.info("packing", extra={"order": 7, "parts": ["a", "b"], "run_id": "of somebody else"})
    assert {"order": 7, "parts": ["a", "b"], "run_id": "of somebody else"}.items() <= said.line.items()


def test_what_a_record_says_itself_is_not_replaced(said: Said) -> None:
    with executing(FACTS, STEP):
        said.log.info("packing", extra={"run_id": "of somebody else", "level": "of its own"})
    assert said.line["run_id"] == "of somebody else"
    assert said.line["level"] == "INFO"


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("value", [Odd(), "half a \ud83d", float("nan"), 1 << 80, {1, 2}, object(), b"bytes"])
def test_whatever_is_added_a_line_is_written(said: Said, value: object) -> None:
    said.log.info("packing", extra={"value": value})
    assert said.line["message"] == "packing"


class _Textless:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("message", "argument", "written"),
    [
        ("packed %d", "seven", "packed %d ('seven',)"),
        ("packed", 7, "packed (7,)"),
        (_Textless(), 7, "<_Textless> (7,)"),
    ],
)
def test_a_line_is_written_whose_arguments_do_not_fit(
    said: Said, message: object, argument: object, written: str
) -> None:
    said.log.propagate = False  # other handlers do not write it
    said.log.warning(message, argument)
    assert said.line["message"] == written


def test_a_line_is_one_line(said: Said) -> None:
    said.log.info("first\nsecond\r\x1b[31m")
    assert said.line["message"] == "first\nsecond\r\x1b[31m"


def test_an_exception_is_part_of_its_line(said: Said) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        said.log.exception("packing failed")
    assert said.line["exception"].startswith("Traceback")
    assert said.line["exception"].endswith("ValueError: no")


@contextmanager
def bare_root() -> Iterator[None]:
    """Take the handlers of the root logger away, those of the test runner as well, as a process begins without any."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_lines_for_people_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    with bare_root():
        set_up_logs("INFO")
        logging.getLogger("shop").info("packing")
        logging.getLogger("shop").debug("not told")
    line = capsys.readouterr().err
    assert line.endswith("shop: packing\n")
    assert " INFO " in line


def test_processes_write_json_where_they_are_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    with bare_root():
        set_up_logs(logging.INFO, "json", worker=5)
        logging.getLogger("shop").info("packing")
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["worker"]) == ("packing", 5)
