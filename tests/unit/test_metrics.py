from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from worker.telemetry.metrics import Tally

BUCKETS = (0.001, 0.01, 0.1, 1.0)
SECONDS = st.one_of(st.sampled_from([0.0, *BUCKETS]), st.floats(0, 1000))


def samples(histogram: Histogram) -> list[tuple[str, str, float]]:
    (family,) = histogram.collect()
    return [
        (sample.name, sample.labels.get("le", ""), round(sample.value, 6))
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]


@given(st.lists(st.lists(SECONDS)))
def test_a_tally_hands_over_what_was_observed(rounds: list[list[float]]) -> None:
    one_by_one = Histogram("a", "", buckets=BUCKETS, registry=CollectorRegistry())
    in_bulk = Histogram("a", "", buckets=BUCKETS, registry=CollectorRegistry())
    tally = Tally(in_bulk)
    for observed in rounds:
        for value in observed:
            one_by_one.observe(value)
            tally.observe(value)
        tally.hand_over()
    assert samples(in_bulk) == samples(one_by_one)
