"""The context of a trace as it is stored with runs and signals, and the ids that can be told of a run. Pure.

What is stored is W3C Trace Context as text: a `traceparent`, and behind a space a `tracestate` if there is one.

Processes that never meet have to name the same span: a step is executed below its run's span, which another process
ends days later. So the ids of the spans of a run are not drawn but derived, from the run and the place in it. A run
that was enqueued without a context has a trace id that is derived as well. It is a digest, not the run's id itself:
samplers compare the lower half of a trace id with a ratio, and in ids of runs that half always begins with the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Self
from uuid import UUID

from outbox.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

SCOPE = "stepwell"
"""The name under which Stepwell makes spans, and the messaging system in their attributes."""

_TEXT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?: ([ -~]{1,512}))?")
_MAX_STATE = 512


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span of somebody's, as it is known to others. `flags`: 1 is sampled. `state` is the tracestate, '' for none."""

    trace_id: int
    span_id: int
    flags: int
    state: str = ""

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Return the context in a stored text, None if it holds none."""
        found = _TEXT.fullmatch(text)
        if found is None or found[1] == "ff":
            return None
        made = cls(int(found[2], 16), int(found[3], 16), int(found[4], 16), found[5] or "")
        return made if made.trace_id and made.span_id else None

    @classmethod
    def of_span(cls, known: SpanContext) -> Self:
        """Return what OpenTelemetry knows a span by."""
        return cls(known.trace_id, known.span_id, int(known.trace_flags), known.trace_state.to_header())

    def text(self) -> str:
        """Return what is stored. A tracestate that is too long is left out, as W3C Trace Context allows."""
        parent = f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags & 0xFF:02x}"
        return f"{parent} {self.state}" if 0 < len(self.state) <= _MAX_STATE else parent


def context_text(text: object) -> str:
    """Return a context as it is, or raise ConfigError."""
    if not isinstance(text, str) or TraceContext.of(text) is None:
        raise ConfigError(
            "trace must be a W3C traceparent (00-TRACE-SPAN-FLAGS in lower-case hex), behind a space a tracestate if "
            f"there is one, got {text!r}"
        )
    return text


def trace_id_of(run: UUID, stored: str | None = None) -> int:
    """Return the trace id of a run: that of the context that is stored with it, else a derived one."""
    context = None if stored is None else TraceContext.of(stored)
    return _digest(run, "trace", 16) if context is None else context.trace_id


def span_id_of(run: UUID, epoch: int, path: Sequence[int] = (), execution: int = 0) -> int:
    """Return the id of the span of a run's epoch, or of an execution in it: the nth of the call at `path`."""
    return _digest(run, f"{epoch}:{'.'.join(map(str, path))}:{execution}", 8)


def _digest(run: UUID, place: str, size: int) -> int:
    return int.from_bytes(blake2b(run.bytes + place.encode(), digest_size=size).digest()) or 1
