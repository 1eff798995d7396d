"""The context of a trace as text, and the ids that are derived from a run."""

from __future__ import annotations

import time
from uuid import UUID, uuid4

import pytest

from outbox.errors import ConfigError
from outbox.statements import Options
from outbox.tracing import TraceContext, context_text, span_id_of, trace_id_of

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
RUN = UUID("01988f2e-5b7c-7c11-9d3b-3a1f6f0c2a55")


def run_id() -> UUID:
    """Return a UUID of version 7, as stepwell.new_id makes them."""
    drawn = uuid4().int & (1 << 76) - 1 | int(time.time() * 1000) << 80 | 7 << 76
    return UUID(int=drawn & ~(3 << 62) | 2 << 62)


@pytest.mark.parametrize("text", [PARENT, f"{PARENT} vendor=1,other=2", PARENT.removesuffix("1") + "3"])
def test_a_context_is_read_as_it_was_written(text: str) -> None:
    read = TraceContext.of(text)
    assert read is not None
    assert read.text() == text
    assert context_text(text) == text
    assert Options.of(trace=text).trace == text


def test_what_a_context_says() -> None:
    read = TraceContext.of(f"{PARENT} vendor=1")
    assert read == TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, 1, "vendor=1")
    assert TraceContext.of(PARENT.replace("00-", "cc-", 1)) is not None, "a later version"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "trace",
        PARENT.upper(),
        PARENT + "0",
        PARENT[:-1],
        f"{PARENT}-more",
        f"{PARENT}\n",
        f"{PARENT} ",
        f"{PARENT} vendor=\n1",
        f"{PARENT} {'v' * 513}",
        PARENT.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        "00-٠af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ],
)
def test_what_is_no_context_is_refused(text: str) -> None:
    assert TraceContext.of(text) is None
    with pytest.raises(ConfigError, match="trace must be a W3C traceparent"):
        Options.of(trace=text)


def test_a_tracestate_that_is_too_long_is_left_out() -> None:
    assert TraceContext(1, 2, 1, "v" * 512).text().endswith(" " + "v" * 512)
    assert " " not in TraceContext(1, 2, 1, "v" * 513).text()


def test_ids_follow_from_the_run_and_the_place_in_it() -> None:
    assert trace_id_of(RUN) == trace_id_of(UUID(str(RUN)))
    assert trace_id_of(RUN, PARENT) == 0x0AF7651916CD43DD8448EB211C80319C
    places = [(RUN, 0), (RUN, 1), (RUN, 0, (1,)), (RUN, 0, (1,), 1), (RUN, 0, (1, 1), 1), (RUN, 0, (11,), 1)]
    others = [(uuid4(), *place[1:]) for place in places]
    assert len({span_id_of(*place) for place in (*places, *others)}) == 12
    assert all(0 < span_id_of(*place) < 1 << 64 for place in places)


def test_derived_trace_ids_are_spread_evenly_where_samplers_look() -> None:
    """A ratio is compared with the lower half, in which ids of runs themselves all lie between a half and three quarters."""
    runs = [run_id() for _ in range(2000)]
    assert {run.version for run in runs} == {7}
    assert {(run.int & (1 << 64) - 1) >> 62 for run in runs} == {2}
    quarters = [(trace_id_of(run) & (1 << 64) - 1) >> 62 for run in runs]
    assert all(400 < quarters.count(quarter) < 600 for quarter in range(4))
