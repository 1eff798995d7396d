"""Clients in a process that may use OpenTelemetry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

MODULE = """
import importing
importing.begun.set()
assert importing.looked.wait(20)
def get_current_span():
    return importing
"""
IMPORTING = """
import threading
begun, looked = threading.Event(), threading.Event()
is_valid = False
def get_span_context():
    import importing
    return importing
"""
SCRIPT = """
import importlib, logging, sys, threading
import importing
from outbox.producing import enqueueing_many
from outbox.statements import Options
from worker.telemetry.logs import Whereabouts

def look():
    with enqueueing_many("ship", Options.of(), 3) as options:
        assert options == Options.of()
    assert Whereabouts().filter(logging.makeLogRecord({}))
    done.append(1)

done = []
threading.Thread(target=importlib.import_module, args=["opentelemetry.trace"]).start()
assert importing.begun.wait(20)
assert not hasattr(sys.modules["opentelemetry.trace"], "get_current_span")
looking = threading.Thread(target=look)
looking.start()
looking.join(0.2)
importing.looked.set()
looking.join(20)
assert done
"""


def test_who_enqueues_or_logs_while_opentelemetry_is_imported_waits_for_that(tmp_path: Path) -> None:
    """A thread that imports a module has it in sys.modules before there is anything in it."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()
    (tmp_path / "opentelemetry" / "trace.py").write_text(MODULE)
    (tmp_path / "importing.py").write_text(IMPORTING)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0
