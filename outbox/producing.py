"""The spans of whoever enqueues and signals, and how their context gets to what is sent.

OpenTelemetry is used where the caller's process has imported it, as every process has that makes spans; it is never
imported from here. Where nobody has set it up there are no spans, but a context that the caller was given is passed on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.statements import Options
from outbox.tracing import SCOPE, TraceContext

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class Enqueueing:
    """A run that is being enqueued. `options` say how, with the context that it goes on from."""

    __slots__ = ("_span", "options")

    def __init__(self, options: Options, span: Span | None = None) -> None:
        self.options = options
        self._span = span

    def note(self, run: UUID, *, created: bool) -> None:
        """Take note of the run; of the one that had the key already where none was created."""
        if self._span is not None:
            self._span.set_attribute("messaging.message.id", str(run))
            self._span.set_attribute("stepwell.created", created)


@contextmanager
def enqueueing(workflow: str, options: Options) -> Iterator[Enqueueing]:
    """Have a span ``enqueue WORKFLOW`` around this block, from which the run goes on.

    A context that is given in the options is passed on as it is, without a span of our own.
    """
    otel = opentelemetry_in_use()
    if otel is None or options.trace is not None:
        yield Enqueueing(options)
        return
    with _span(otel, "enqueue", workflow, {"stepwell.workflow": workflow}, options.queue) as span:
        yield Enqueueing(replace(options, trace=_context_of(span)), span)


@contextmanager
def enqueueing_many(workflow: str, options: Options, count: int) -> Iterator[Options]:
    """Have one span around a batch of `count` runs, where there is a span around it already; yield options for them.

    Elsewhere each run has a trace of its own: a thousand runs in a trace that nobody has begun could not be read.
    """
    otel = opentelemetry_in_use()
    if otel is None or options.trace is not None or not otel.get_current_span().get_span_context().is_valid:
        yield options
        return
    about: dict[str, str | int] = {"stepwell.workflow": workflow, "messaging.batch.message_count": count}
    with _span(otel, "enqueue", workflow, about, options.queue) as span:
        yield replace(options, trace=_context_of(span))


@contextmanager
def signalling(run: UUID, name: str) -> Iterator[str | None]:
    """Have a span ``signal NAME`` around this block; yield its context, to which whoever takes the signal links."""
    otel = opentelemetry_in_use()
    if otel is None:
        yield None
        return
    with _span(otel, "signal", name, {"stepwell.run.id": str(run), "stepwell.signal": name}) as span:
        yield _context_of(span)


def opentelemetry_in_use() -> Any:
    """Return OpenTelemetry's API if this process has imported it; waits for a thread that is at it just now."""
    if sys.modules.get("opentelemetry.trace") is None:
        return None
    import opentelemetry.trace as otel

    return otel


@contextmanager
def _span(
    otel: Any, operation: str, what: str, about: dict[str, str | int], queue: str | None = None
) -> Iterator[Span]:
    attributes = {
        "messaging.system": SCOPE,
        "messaging.operation.name": operation,
        "messaging.operation.type": "send",
        **about,
    }
    if queue is not None:
        attributes["messaging.destination.name"] = queue
    with otel.get_tracer(SCOPE).start_as_current_span(
        f"{operation} {what}",
        kind=otel.SpanKind.PRODUCER,
        attributes=attributes,
        record_exception=False,  # an error of the database may quote what was sent
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except Exception as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(otel.StatusCode.ERROR, type(error).__qualname__)
            raise


def _context_of(span: Span) -> str | None:
    """Return a span as others know it; None where OpenTelemetry is not set up and the caller was given no context."""
    known = span.get_span_context()
    return TraceContext.of_span(known).text() if known.is_valid else None
