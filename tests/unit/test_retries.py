from __future__ import annotations

from datetime import timedelta

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from tenacity import (
    retry_if_exception_message,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_before_delay,
    stop_never,
    wait_chain,
    wait_exponential,
    wait_exponential_jitter,
    wait_fixed,
    wait_none,
)

from outbox.errors import ConfigError, Permanent, RetryAfter
from tests.unit.drives import CREATED, record
from worker.replay.records import VOIDED
from worker.retries import Failure, Retry, RetryPolicy, Stop, failures_of, retrying

ERROR = ConnectionError("reset")


def failures(*seconds: float) -> list[Failure]:
    return [Failure(CREATED + timedelta(seconds=each)) for each in seconds]


def decide(policy: RetryPolicy, count: int, error: BaseException = ERROR) -> Stop | Retry:
    return policy.decide(failures(*range(count)), error)


class TestStop:
    def test_the_count_of_failures_stops(self):
        policy = retrying(stop=stop_after_attempt(3), wait=wait_fixed(2))
        assert [decide(policy, count) for count in (1, 2)] == [Retry(2.0)] * 2
        assert decide(policy, 3) == Stop("the policy allows no more after 3 failures")

    def test_the_time_between_recorded_failures_stops(self):
        policy = retrying(stop=stop_after_delay(60), wait=wait_none())
        assert policy.decide(failures(0, 59), ERROR) == Retry(0.0)
        assert isinstance(policy.decide(failures(0, 60), ERROR), Stop)
        assert isinstance(
            policy.decide(failures(10), ERROR, started_at=CREATED - timedelta(seconds=51)), Stop
        )

    def test_stop_before_delay_counts_the_wait_to_come(self):
        policy = retrying(stop=stop_before_delay(60), wait=wait_fixed(10))
        assert policy.decide(failures(0, 49), ERROR) == Retry(10.0)
        assert isinstance(policy.decide(failures(0, 50), ERROR), Stop)

    def test_stops_combine(self):
        policy = retrying(stop=stop_after_attempt(5) | stop_after_delay(1), wait=wait_none())
        assert isinstance(policy.decide(failures(0, 2), ERROR), Stop)

    def test_stop_never_never_stops(self):
        assert decide(retrying(stop=stop_never, wait=wait_none()), 100_000) == Retry(0.0)

    def test_without_a_stop_the_fifth_failure_is_final(self):
        policy = retrying()
        assert [type(decide(policy, count)) for count in range(1, 6)] == [Retry] * 4 + [Stop]

    def test_without_failures_the_one_at_hand_is_the_first(self):
        assert retrying(stop=stop_after_attempt(1)).decide([], ERROR) == Stop(
            "the policy allows no more after one failure"
        )


class TestWait:
    def test_the_wait_follows_the_count_of_recorded_failures(self):
        policy = retrying(stop=stop_never, wait=wait_exponential(multiplier=1, max=60))
        assert [decide(policy, count) for count in (1, 2, 3, 10)] == [Retry(1), Retry(2), Retry(4), Retry(60)]

    def test_a_wait_may_be_a_timedelta(self):
        assert decide(retrying(wait=lambda state: timedelta(minutes=1)), 1) == Retry(60.0)

    def test_chains_and_sums_of_waits_work(self):
        policy = retrying(stop=stop_never, wait=wait_chain(wait_fixed(1), wait_fixed(5)) + wait_fixed(0.5))
        assert [decide(policy, count) for count in (1, 2, 3)] == [Retry(1.5), Retry(5.5), Retry(5.5)]

    @given(st.integers(1, 10_000))
    def test_the_wait_is_finite_and_not_negative(self, count: int):
        decision = decide(retrying(stop=stop_never, wait=wait_exponential_jitter(1, 60)), count)
        assert isinstance(decision, Retry)
        assert 0 <= decision.seconds <= 60

    @pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -3])
    def test_a_wait_that_is_no_duration_is_none(self, seconds: float):
        assert decide(retrying(wait=lambda state: seconds), 1) == Retry(0.0)


class TestOn:
    def test_a_class_or_a_tuple_of_classes_says_what_is_tried_again(self):
        for on in (OSError, (OSError, KeyError)):
            policy = retrying(on=on, wait=wait_none())
            assert decide(policy, 1, ERROR) == Retry(0.0)
            assert decide(policy, 1, ValueError()) == Stop(
                "ValueError is not among the errors that are tried again"
            )

    def test_a_tenacity_retry_object_says_it_too(self):
        policy = retrying(
            on=retry_if_exception_type(OSError) | retry_if_exception_message(match="busy"), wait=wait_none()
        )
        assert decide(policy, 1, ERROR) == Retry(0.0)
        assert decide(policy, 1, ValueError("busy")) == Retry(0.0)
        assert isinstance(decide(policy, 1, ValueError("broken")), Stop)

    def test_by_default_every_exception_is(self):
        assert isinstance(decide(retrying(), 1, ValueError()), Retry)
        assert isinstance(decide(retrying(), 1, SystemExit()), Stop)


class TestUsersErrors:
    def test_permanent_stops_whatever_the_policy_says(self):
        assert decide(retrying(stop=stop_never), 1, Permanent("no")) == Stop("the error is permanent")

    def test_retry_after_sets_the_wait_and_leaves_the_stop(self):
        policy = retrying(stop=stop_after_attempt(2), wait=wait_fixed(1), on=OSError)
        assert decide(policy, 1, RetryAfter(90)) == Retry(90.0)
        assert decide(policy, 1, RetryAfter(timedelta(minutes=2))) == Retry(120.0)
        assert isinstance(decide(policy, 2, RetryAfter(90)), Stop)

    def test_a_policy_that_raises_stops_and_says_so(self):
        def broken(state: tenacity.RetryCallState) -> float:
            raise ZeroDivisionError("oops")

        assert decide(retrying(wait=broken), 1) == Stop("the retry policy raised ZeroDivisionError: oops")


class TestRecords:
    def test_what_failed_or_ran_out_of_time_counts_and_nothing_else(self):
        fault = {"type": "ValueError", "message": "x"}
        earlier = [
            record(1, "a", n=1, error=fault, seq=1),
            record(1, "a", n=2, outcome="interrupted", seq=2),
            record(1, "a", n=3, outcome="interrupted", error={"type": "TimeoutError"}, seq=3),
            record(1, "a", n=4, outcome=VOIDED, error=fault, seq=4),
        ]
        assert failures_of(earlier) == [Failure(earlier[0].at), Failure(earlier[2].at)]

    def test_a_restart_does_not_reset_the_count(self):
        policy = retrying(stop=stop_after_attempt(3), wait=wait_none())
        fault = {"type": "ValueError", "message": "x"}
        earlier = [record(1, "a", n=n, error=fault, seq=n) for n in (1, 2, 3)]
        assert isinstance(policy.decide(failures_of(earlier), ERROR), Stop)


class TestBadPolicies:
    @pytest.mark.parametrize(
        ("options", "parameter"),
        [
            ({"stop": 3}, "stop"),
            ({"stop": stop_after_attempt}, "stop"),
            ({"stop": retry_if_exception_type(OSError)}, "stop"),
            ({"wait": 2.0}, "wait"),
            ({"wait": wait_fixed}, "wait"),
            ({"on": "OSError"}, "on"),
            ({"on": (OSError, "x")}, "on"),
            ({"on": ()}, "on"),
            ({"on": int}, "on"),
            ({"on": tenacity.asyncio.retry_if_exception(lambda error: True)}, "on"),
        ],
    )
    def test_what_is_no_policy_is_an_error_at_import(self, options: dict[str, object], parameter: str):
        with pytest.raises(ConfigError, match=rf"retrying\({parameter}=…\)"):
            retrying(**options)
