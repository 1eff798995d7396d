"""What the demo's scenario does without its processes: its pace, its port, and how it takes note of signals."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from worker.demo.interruption import Interrupted, Interruption
from worker.demo.processes import reserved_port
from worker.demo.scenario import WAVES, WAVES_TAKE_SECONDS, pace


@pytest.mark.parametrize("processes", [1, 3, 8])
@pytest.mark.parametrize("leads", [50, 300, 1000, 20_000])
def test_the_work_comes_in_several_waves_whatever_is_asked_for(leads: int, processes: int) -> None:
    concurrency, latency_seconds = pace(leads, processes)

    waves = leads / (concurrency * processes)
    assert 1 <= concurrency <= 32
    assert waves >= WAVES
    assert latency_seconds * waves >= WAVES_TAKE_SECONDS - 0.001
    assert latency_seconds * min(leads, 1000) / (concurrency * processes) <= 2 * WAVES_TAKE_SECONDS


def test_a_single_lead_has_a_pace_too() -> None:
    assert pace(1, 3) == (1, 1.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_raised_where_it_is_asked_for_and_nowhere_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name):
            interruption.check()
        with pytest.raises(Interrupted):
            interruption.sleep(60)
        interruption.wait()

    assert signal.getsignal(number) is before


def test_without_a_signal_a_sleep_lasts_its_time() -> None:
    with Interruption() as interruption:
        started = time.monotonic()
        interruption.sleep(0.06)

    assert time.monotonic() - started >= 0.06


def test_two_demos_that_start_at_once_do_not_take_one_port() -> None:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        wanted = probe.getsockname()[1]

    with reserved_port(wanted) as first, reserved_port(wanted) as second:
        assert first == wanted
        assert second != wanted
    with reserved_port(wanted) as again:
        assert again == wanted


def test_a_port_that_somebody_listens_on_is_not_taken() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with reserved_port(other.getsockname()[1]) as port:
            assert port != other.getsockname()[1]
