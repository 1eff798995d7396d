"""The Grafana dashboard as tests look at it: its panels, and its queries as Grafana would send them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.prometheus import ROOT

GRAFANA = ROOT / "deploy" / "grafana"
FILE = GRAFANA / "dashboards" / "stepwell.json"
# What Grafana puts in the place of variables.
VALUES = {"job": "stepwell", "queue": ".*", "__rate_interval": "10s"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [each for each in dashboard()["panels"] if each["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Yield each query with where it is: (panel and its number, expression)."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"{panel['id']}{target['refId']} {panel['title']}", filled_in(target["expr"])


def filled_in(expression: str) -> str:
    """Return an expression with values for its variables; KeyError for a variable that nobody has defined."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: VALUES[found[1]], expression)
