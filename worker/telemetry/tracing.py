"""Where the spans of a worker go, and how they get the ids that other processes know beforehand.

Tracing is on where APP has set up the OpenTelemetry SDK (its provider, with its sampler and processors, is used as it is),
or where the environment names an OTLP endpoint, or STEPWELL_TRACING is set: then a provider is set up here, by the
standard ``OTEL_…`` variables. Everywhere else nothing of OpenTelemetry is imported. It comes with the extra `otel`, so
imports stand in the functions that need them.

Spans are made by the SDK, so that samplers, limits and processors are those of the provider. Only their ids are chosen:
the tracer of each `Tracing` is its own, and draws ids from a generator that hands out the chosen ones first.
"""

from __future__ import annotations

import contextvars
import copy
import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from outbox.errors import ConfigError
from outbox.settings import Settings, without_password
from outbox.tracing import SCOPE, TraceContext

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

Kind = Literal["INTERNAL", "CLIENT", "CONSUMER"]
Attributes = Mapping[str, str | int | float | bool]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
_EXPORTERS = "OTEL_TRACES_EXPORTER"
_MEMBER = re.compile(
    r"([a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[ -+\--<>-~]{0,255}[!-+\--<>-~]"
)
_MOST_MEMBERS = 32
"""What a tracestate is made of, and of how many."""


class Tracing:
    """Makes spans for one engine, in its event loop. `provider` is the SDK's."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace

        self._context, self._trace = context, trace
        self._provider = provider
        # The provider has one tracer for each name, for all threads; a copy of it is used in this loop only.
        tracer: Any = copy.copy(provider.get_tracer(SCOPE, _release()))
        self._ids = _Chosen(tracer.id_generator)
        tracer.id_generator = self._ids
        self._tracer = tracer

    def start(
        self,
        name: str,
        *,
        kind: Kind = "INTERNAL",
        parent: TraceContext | Span | None,
        attributes: Attributes,
        at: int | None = None,
        trace_id: int | None = None,
        span_id: int | None = None,
        links: Sequence[TraceContext] = (),
    ) -> Span:
        """Start a span at `at` (nanoseconds since 1970, None: now), with the ids that are given.

        `trace_id` is that of a span without a parent. The provider's sampler decides whether it is recorded.
        """
        trace = self._trace
        self._ids.choose(trace_id, span_id)
        try:
            span: Span = self._tracer.start_span(
                name,
                context=self._below(parent),
                kind=trace.SpanKind[kind],
                attributes=dict(attributes),
                links=[trace.Link(_known(each)) for each in links],
                start_time=at,
                record_exception=False,
                set_status_on_exception=False,
            )
        finally:
            self._ids.choose(None, None)
        return span

    def enter(self, span: Span) -> Token[Context]:
        """Make a span the current one, until `leave` is called in the same task or thread."""
        return self._context.attach(self._trace.set_span_in_context(span))

    def leave(self, token: Token[Context]) -> None:
        """Make the span before the current one again."""
        self._context.detach(token)

    def inside(self, span: Span) -> contextvars.Context:
        """Return a fresh context with nothing in it but this span, as the current one."""
        made = contextvars.Context()
        made.run(self.enter, span)
        return made

    def fail(self, span: Span, kind: str) -> None:
        """Mark a span as failed, by the type of the error."""
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.StatusCode.ERROR, kind)

    def context_of(self, span: Span) -> TraceContext:
        """Return a span as other processes know it."""
        return TraceContext.of_span(span.get_span_context())

    def flush(self, seconds: float) -> None:
        """Send what has ended, for so long at most: processors and exporters have time-outs of their own."""
        sending = threading.Thread(
            target=self._provider.force_flush, args=(int(seconds * 1000),), name="stepwell flush", daemon=True
        )
        sending.start()
        sending.join(seconds)

    def _below(self, parent: TraceContext | Span | None) -> Context:
        """Return a context in which a span is the child of `parent`, of nothing that happens to be current."""
        empty = self._context.Context()
        if parent is None:
            return empty
        if isinstance(parent, TraceContext):
            parent = self._trace.NonRecordingSpan(_known(parent))
        return self._trace.set_span_in_context(parent, empty)


class _Chosen:
    """An id generator that gives the chosen ids first, and then what the provider's own gives."""

    def __init__(self, otherwise: IdGenerator) -> None:
        self._otherwise: Any = otherwise
        self._trace_id: int | None = None
        self._span_id: int | None = None

    def choose(self, trace_id: int | None, span_id: int | None) -> None:
        self._trace_id, self._span_id = trace_id, span_id

    def generate_trace_id(self) -> int:
        return self._otherwise.generate_trace_id() if self._trace_id is None else self._trace_id

    def generate_span_id(self) -> int:
        return self._otherwise.generate_span_id() if self._span_id is None else self._span_id

    def is_trace_id_random(self) -> bool:
        """Tell newer SDKs whether to flag a trace id as random: a derived one is spread as evenly, but is not drawn."""
        return self._trace_id is None and bool(self._otherwise.is_trace_id_random())


def _known(context: TraceContext) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    # Another is dropped, as W3C Trace Context says; OpenTelemetry drops it as well, and logs a warning for each claim.
    members = [each for each in map(str.strip, context.state.split(",")) if each]
    known = len(members) <= _MOST_MEMBERS and all(map(_MEMBER.fullmatch, members))
    state = TraceState.from_header([",".join(members)]) if known and members else None
    return SpanContext(context.trace_id, context.span_id, True, TraceFlags(context.flags), state)


# -- setting up --------------------------------------------------------------------------------------


def of_process() -> Tracing | None:
    """Return what this process has set up itself, None if it has not."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from opentelemetry.sdk.trace import Tracer, TracerProvider
    from opentelemetry.trace import get_tracer_provider

    provider = get_tracer_provider()
    if not isinstance(provider, TracerProvider) or not isinstance(provider.get_tracer(SCOPE), Tracer):
        return None  # the second: OTEL_SDK_DISABLED
    return Tracing(provider)


def of_worker(settings: Settings, worker_id: int) -> Tracing | None:
    """Return what a worker process traces with, None if it does not. Called once, when APP is loaded.

    Raises ConfigError where tracing was asked for and cannot be; where it only follows from the environment, which is
    often the same for all programs of a machine, a warning says so.
    """
    if settings.tracing is False or _variable("OTEL_SDK_DISABLED").lower() == "true":
        return None
    found = of_process()
    if found is not None:
        logger.info("tracing runs with the provider that APP has set up")
        return found
    if _variable(_EXPORTERS) == "none" or not (settings.tracing or _first_of(_ENDPOINTS)):
        return None
    try:
        return Tracing(_exporting(worker_id))
    except ConfigError as error:
        if settings.tracing:
            raise
        logger.warning("runs are not traced: %s", error)
        return None


def _exporting(worker_id: int) -> TracerProvider:
    """Set up a provider that sends to an OTLP endpoint, for the whole process. Raises ConfigError."""
    try:
        provider = _provider(worker_id)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'tracing needs more than is installed ({error}): pip install "stepwell[otel]"'
        ) from None
    except (ValueError, RuntimeError) as error:  # the SDK reads some of its variables when it is imported
        raise ConfigError(f"OpenTelemetry refuses an OTEL_ variable of the environment: {error}") from None
    logger.info(
        "tracing runs to %s", without_password(_first_of(_ENDPOINTS)) or "an OTLP endpoint on this machine"
    )
    return provider


def _provider(worker_id: int) -> TracerProvider:
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    present = trace.get_tracer_provider()
    if not isinstance(present, trace.ProxyTracerProvider):
        raise ConfigError(
            f"spans with given ids are made by the OpenTelemetry SDK only, and APP has set up "
            f"`{type(present).__module__}.{type(present).__qualname__}`"
        )
    # What is left `flush` sends. The SDK's own end would wait once more for a collector that hangs.
    made = TracerProvider(resource=Resource.create(_resource(worker_id)), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(_exporter()))
    trace.set_tracer_provider(made)
    return made


def _exporter() -> SpanExporter:
    exporters = _variable(_EXPORTERS) or "otlp"
    if "otlp" not in (each.strip() for each in exporters.split(",")):
        raise ConfigError(f"{_EXPORTERS} is {exporters!r}; workers send by otlp, or not at all (none)")
    protocol = _first_of(_PROTOCOLS) or _HTTP
    if protocol == "grpc":
        try:  # not in the extra, so by its name
            grpc: Any = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
        except ModuleNotFoundError:
            raise ConfigError(
                f"{_PROTOCOLS[1]} is grpc, for which opentelemetry-exporter-otlp-proto-grpc has to be installed; "
                f"{_HTTP} is there"
            ) from None
        made: SpanExporter = grpc.OTLPSpanExporter()
        return made
    if protocol != _HTTP:
        raise ConfigError(f"{_PROTOCOLS[1]} is {protocol!r}; {_HTTP} and grpc can be spoken")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _resource(worker_id: int) -> dict[str, str]:
    """Return what says of which process spans are, where the environment does not."""
    given = _variable("OTEL_RESOURCE_ATTRIBUTES")
    attributes = {} if "service.instance.id=" in given else {"service.instance.id": str(worker_id)}
    if not _variable("OTEL_SERVICE_NAME") and "service.name=" not in given:
        attributes["service.name"] = SCOPE
    return attributes


def _release() -> str | None:
    try:
        return version("stepwell")
    except PackageNotFoundError:  # a checkout that was not installed
        return None


def _first_of(names: Sequence[str]) -> str:
    return next((text for name in names if (text := _variable(name))), "")


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()
