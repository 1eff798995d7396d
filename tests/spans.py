"""Spans as tests look at them: from an exporter in memory, or from a collector that real processes send to by OTLP."""

from __future__ import annotations

import gzip
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from worker.telemetry.tracing import Tracing


@dataclass(frozen=True)
class Span:
    """One span that was sent. Ids are hex, times nanoseconds since 1970, `parent` is '' for a root."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    kind: str
    failed: bool
    start: int
    end: int
    attributes: dict[str, Any] = field(repr=False)
    events: tuple[tuple[str, dict[str, Any]], ...] = field(repr=False)
    links: tuple[tuple[str, str], ...] = field(repr=False)
    resource: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def outcome(self) -> Any:
        return self.attributes.get("stepwell.outcome")

    @property
    def worker(self) -> Any:
        return self.attributes.get("stepwell.worker")


class Spans(list[Span]):
    """Spans, in the order in which they were sent."""

    def named(self, name: str) -> Spans:
        return Spans(span for span in self if span.name == name)

    def one(self, name: str, **attributes: Any) -> Span:
        """Return the only span of this name, with these attributes of ours: ``one("step pay", execution=2)``."""
        wanted = {f"stepwell.{key}": value for key, value in attributes.items()}
        found = [span for span in self.named(name) if wanted.items() <= span.attributes.items()]
        assert len(found) == 1, f"{len(found)} spans {name!r} with {attributes} among {self.names()}"
        return found[0]

    def names(self) -> dict[str, int]:
        return dict(Counter(span.name for span in self))

    def of_run(self, run: object) -> Spans:
        return Spans(span for span in self if span.attributes.get("stepwell.run.id") == str(run))

    @property
    def roots(self) -> Spans:
        return Spans(span for span in self if not span.parent)

    def check_whole(self, *, roots: int = 1) -> None:
        """Assert that this is one trace, with one root, in which no parent is missing and no id comes twice."""
        assert len({span.trace_id for span in self}) == 1, {span.trace_id: span.name for span in self}
        assert len(self.roots) == roots, self.roots
        ids = Counter(span.span_id for span in self)
        assert max(ids.values()) == 1, [span for span in self if ids[span.span_id] > 1]
        dangling = [span for span in self if span.parent and span.parent not in ids]
        assert not dangling, dangling


class Memory:
    """A provider of the SDK whose spans stay here. `tracing` is for an engine."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def tracing(self) -> Tracing:
        return Tracing(self.provider)

    @property
    def spans(self) -> Spans:
        return Spans(_of_sdk(span) for span in self._exporter.get_finished_spans())

    def clear(self) -> None:
        self._exporter.clear()


def _of_sdk(span: ReadableSpan) -> Span:
    known, parent = span.get_span_context(), span.parent
    assert known is not None
    return Span(
        name=span.name,
        trace_id=f"{known.trace_id:032x}",
        span_id=f"{known.span_id:016x}",
        parent="" if parent is None else f"{parent.span_id:016x}",
        kind=span.kind.name,
        failed=not span.status.is_ok,
        start=span.start_time or 0,
        end=span.end_time or 0,
        attributes=dict(span.attributes or {}),
        events=tuple((event.name, dict(event.attributes or {})) for event in span.events),
        links=tuple((f"{each.context.trace_id:032x}", f"{each.context.span_id:016x}") for each in span.links),
        resource=dict(span.resource.attributes),
    )


class Collector:
    """Takes what OTLP exporters send over HTTP. `environment` is what a process needs to send here, at once."""

    def __init__(self, port: int) -> None:
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "5",
        }
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def spans(self) -> Spans:
        with self._lock:
            return Spans(self._spans)

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            self._spans.extend(_of_otlp(request))


@contextmanager
def collecting_spans() -> Iterator[Collector]:
    """Run a collector on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                collector.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_address[1])
        serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        serving.start()
        try:
            yield collector
        finally:
            server.shutdown()
            serving.join()


def _of_otlp(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        about = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    kind=type(span).SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    failed=span.status.code == 2,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    attributes=_values(span.attributes),
                    events=tuple((event.name, _values(event.attributes)) for event in span.events),
                    links=tuple((each.trace_id.hex(), each.span_id.hex()) for each in span.links),
                    resource=about,
                )


def _values(attributes: Iterable[Any]) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
