"""When a worker process traces, and with what. Each case is a process: a provider is set up once in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from outbox.tracing import TraceContext
from tests.spans import Memory

ROOT = Path(__file__).parents[2]
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}

SCRIPT = """
import json, logging, sys
warnings = []
class Note(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger("worker.telemetry.tracing").addHandler(Note(logging.WARNING))
{app}
from outbox.errors import ConfigError
from outbox.settings import Settings
from worker.telemetry import tracing
found, said = None, None
try:
    found = tracing.of_worker(Settings.load(), 4711)
except ConfigError as error:
    said = str(error)
kind = resource = None
if found is not None:
    kind = type(found._provider).__module__ + "." + type(found._provider).__qualname__
    resource = dict(found._provider.resource.attributes)
loaded = any(name.startswith("opentelemetry") for name in sys.modules)
print(json.dumps({{"traces": found is not None, "said": said, "warnings": warnings, "loaded": loaded,
                   "resource": resource, "mine": bool(found) and getattr(found._provider, "mine", False)}}))
sys.stdout.flush()
import os
os._exit(0)  # nothing is sent at the end
"""

APP = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
provider = TracerProvider()
provider.mine = True
trace.set_tracer_provider(provider)
"""
FOREIGN = """
from opentelemetry import trace
class Foreign(trace.NoOpTracerProvider):
    pass
trace.set_tracer_provider(Foreign())
"""
WITHOUT_SDK = "import sys; sys.modules['opentelemetry.sdk'] = None"
WITHOUT_EXPORTER = "import sys; sys.modules['opentelemetry.exporter'] = None"
WITHOUT_GRPC = "import sys; sys.modules['opentelemetry.exporter.otlp.proto.grpc'] = None"


def of_worker(app: str = "", **environment: str) -> dict[str, Any]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "STEPWELL_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(app=app)],
        capture_output=True, text=True, check=False, env={**bare, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_nobody_asks_so_nothing_is_loaded() -> None:
    answer = of_worker()
    assert (answer["traces"], answer["loaded"], answer["warnings"]) == (False, False, [])


def test_an_endpoint_in_the_environment_is_enough() -> None:
    answer = of_worker(**ENDPOINT)
    assert answer["traces"]
    assert answer["resource"]["service.name"] == "stepwell"
    assert answer["resource"]["service.instance.id"] == "4711"


def test_the_environment_says_who_we_are() -> None:
    answer = of_worker(
        OTEL_SERVICE_NAME="shop", OTEL_RESOURCE_ATTRIBUTES="service.instance.id=7,tier=1", **ENDPOINT
    )
    about = answer["resource"]
    assert (about["service.name"], about["service.instance.id"], about["tier"]) == ("shop", "7", "1")


def test_what_the_app_has_set_up_is_kept() -> None:
    assert of_worker(APP)["mine"]
    assert of_worker(APP, **ENDPOINT)["mine"]


@pytest.mark.parametrize(
    "environment",
    [
        {"STEPWELL_TRACING": "0"},
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "none", "STEPWELL_TRACING": "1"},
        {"OTEL_SDK_DISABLED": "true", "STEPWELL_TRACING": "1"},
    ],
)
def test_it_can_be_turned_off(environment: dict[str, str]) -> None:
    answer = of_worker(**ENDPOINT, **environment)
    assert (answer["traces"], answer["loaded"]) == (False, False)


def test_it_can_be_turned_off_for_an_app_that_traces() -> None:
    assert not of_worker(APP, STEPWELL_TRACING="0")["traces"]


def test_it_can_be_asked_for() -> None:
    assert of_worker(STEPWELL_TRACING="1")["traces"]


@pytest.mark.parametrize(
    ("app", "environment", "said"),
    [
        (WITHOUT_SDK, {}, 'pip install "stepwell[otel]"'),
        (WITHOUT_EXPORTER, {}, 'pip install "stepwell[otel]"'),
        (WITHOUT_GRPC, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "opentelemetry-exporter-otlp-proto-grpc"),
        (
            "",
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "is 'http/json'; http/protobuf and grpc can be spoken",
        ),
        ("", {"OTEL_TRACES_EXPORTER": "console"}, "is 'console'; workers send by otlp, or not at all"),
        (
            "",
            {"OTEL_BSP_MAX_QUEUE_SIZE": "100"},
            "refuses an OTEL_ variable of the environment: max_export_batch_size must be",
        ),
        (
            "",
            {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "-1"},
            "refuses an OTEL_ variable of the environment: OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT must be",
        ),
        (FOREIGN, {}, "by the OpenTelemetry SDK only, and APP has set up `__main__.Foreign`"),
    ],
)
def test_what_cannot_be_done_is_an_error_where_it_was_asked_for_and_else_a_warning(
    app: str, environment: dict[str, str], said: str
) -> None:
    answer = of_worker(app, **environment, **ENDPOINT)
    assert (answer["traces"], answer["said"]) == (False, None)
    (warning,) = answer["warnings"]
    assert warning.startswith("runs are not traced: ")
    assert said in warning
    asked = of_worker(app, STEPWELL_TRACING="1", **environment)
    assert said in asked["said"]
    assert not asked["warnings"]


def test_spans_have_the_ids_that_are_chosen_and_else_those_of_the_provider() -> None:
    memory = Memory(ALWAYS_ON)
    tracing = memory.tracing()
    parent = TraceContext(5, 6, 1, "vendor=1")
    chosen = tracing.start("chosen", parent=None, attributes={}, trace_id=17, span_id=18)
    child = tracing.start("child", parent=chosen, attributes={}, links=[parent])
    remote = tracing.start("remote", parent=parent, attributes={}, span_id=19)
    free = tracing.start("free", parent=None, attributes={})
    assert tracing.context_of(remote) == TraceContext(
        5, 19, int(remote.get_span_context().trace_flags), "vendor=1"
    )
    for span in (chosen, child, remote, free):
        span.end()
    spans = memory.spans
    assert (int(spans.one("chosen").trace_id, 16), int(spans.one("chosen").span_id, 16)) == (17, 18)
    assert spans.one("chosen").parent == ""
    assert (spans.one("child").trace_id, spans.one("child").parent) == (f"{17:032x}", f"{18:016x}")
    assert spans.one("child").links == ((f"{5:032x}", f"{6:016x}"),)
    assert (spans.one("remote").trace_id, spans.one("remote").parent) == (f"{5:032x}", f"{6:016x}")
    assert len({span.span_id for span in spans}) == 4
    assert spans.one("free").trace_id not in {f"{17:032x}", f"{5:032x}"}


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("vendor=1,tenant@other=a b", "vendor=1,tenant@other=a b"),
        ("vendor=1, ,", "vendor=1"),
        ("junk", ""),
        ("vendor=1,Other=2", ""),
        (f"vendor={'v' * 257}", ""),
        (",".join(f"v{n}=1" for n in range(33)), ""),
        (" ", ""),
    ],
)
def test_a_tracestate_that_is_none_is_dropped_without_a_word(
    state: str, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = Memory().tracing()
    span = tracing.start("remote", parent=TraceContext(5, 6, 1, state), attributes={})
    assert tracing.context_of(span).state == kept
    assert not caplog.records


def test_ids_of_the_application_are_left_alone() -> None:
    memory = Memory()
    tracing = memory.tracing()
    before = memory.provider.id_generator
    with memory.provider.get_tracer("application").start_as_current_span("theirs") as theirs:
        ours = tracing.start("ours", parent=None, attributes={}, trace_id=17, span_id=18)
    assert memory.provider.id_generator is before
    assert theirs.get_span_context().trace_id != 17
    assert ours.get_span_context().span_id == 18


DEAF = """
import socket, sys
deaf = socket.socket()
deaf.bind(("127.0.0.1", 0))
deaf.listen()
import os
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{deaf.getsockname()[1]}"
from outbox.settings import Settings
from worker.telemetry import tracing
found = tracing.of_worker(Settings.load(), 4711)
for _ in range(3):
    found.start("ended", parent=None, attributes={}).end()
found.flush(0.1)
"""


def test_a_collector_that_hangs_holds_up_no_end() -> None:
    """The SDK's own end would wait for as long as its exporter does, a minute here."""
    done = subprocess.run(
        [sys.executable, "-c", DEAF], check=False, timeout=25,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OTEL_EXPORTER_OTLP_TIMEOUT": "60"},
    )  # fmt: skip
    assert done.returncode == 0
