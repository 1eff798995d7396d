"""JSON that is given as an argument, or on stdin by "-"."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

from worker.cli.mistakes import Mistake, one_line

STDIN = "-"


def given_text(text: str) -> str:
    """Return a text, or what stdin has if it is "-". Raises Mistake."""
    try:
        return sys.stdin.buffer.read().decode() if text == STDIN else text
    except UnicodeDecodeError as error:
        raise Mistake(f"stdin is not UTF-8: {one_line(error)}") from None


def read_json(text: str, where: str, hint: str = "") -> Any:
    """Return the value of a JSON text; raises Mistake, beginning with `where`, with the position of what is wrong."""
    try:
        return json.loads(given_text(text), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        said = f"{error.msg[:1].lower()}{error.msg[1:]}"
        raise Mistake(
            f"{where} is not valid JSON: {said} at line {error.lineno}, column {error.colno}{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where} is not valid JSON: {one_line(error)}{hint}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
