"""docs/operations.md: what it links to is there, and its figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from outbox.settings import Settings
from tests.deploy.stops import longest_stop_seconds
from tests.integration import test_connections as connections
from worker.engine.reports import LONG_HISTORY
from worker.supervision import systemd

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "operations.md").read_text()


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        linked = (DOCS / file).read_text() if file else TEXT
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:deploy|examples)/[\w./-]+)`", TEXT))
    assert len(named) > 4
    assert not [name for name in named if not (DOCS.parent / name).exists()]


def test_the_sessions_are_those_that_were_counted() -> None:
    supervisor, exporter, engine = connections.SUPERVISOR, connections.EXPORTER, connections.ENGINE
    pool = Settings().connections
    assert f"| supervisor | {supervisor} |" in TEXT
    assert f"| its `--metrics-port` | {exporter} |" in TEXT
    assert f"| each worker process | {engine}: " in TEXT
    assert f"up to {pool} (`STEPWELL_CONNECTIONS`)" in TEXT
    assert f"a worker process: {connections.DESCRIPTORS}, a session each" in TEXT
    files, each = connections.SUPERVISOR_DESCRIPTORS, connections.FOR_EACH_CHILD
    assert f"a supervisor: {files}, {each} for each worker process" in TEXT
    plain = 10 * (supervisor + exporter + 2 * engine)
    assert f"= {plain} sessions, and {plain + 10 * 2 * pool} if" in TEXT


def test_the_times_are_those_of_the_supervisor() -> None:
    settings = Settings()
    beside = longest_stop_seconds(settings.grace_seconds) - settings.grace_seconds
    assert f"the grace time and at most {beside:g} seconds more" in TEXT
    assert f"`STEPWELL_GRACE_SECONDS` ({settings.grace_seconds:g})" in TEXT
    assert f"`STEPWELL_HANG_AFTER_SECONDS` ({settings.hang_after_seconds:g})" in TEXT
    assert f"Above {LONG_HISTORY:,} records a worker warns" in TEXT
    assert settings.poison_after == 3
    assert "after three of these it is blocked as *PoisonStep*" in TEXT
    assert systemd.NOT_CLAIMING_SECONDS == 300
    assert "claims for five minutes" in " ".join(TEXT.split())
