"""Counts of tokens, next to the library's own metrics with the same values."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from cluster.metrics.token_counts import TokenCounts

BOUNDS = (0.0005, 0.25, 1.0, 80.0)
GAPS_S = (0.0001, 0.0005, 0.1, 0.25, 0.2500001, 1.0, 80.0, 81.0, 1e6)


def test_samples_are_those_of_the_librarys_own_metrics():
    counts = TokenCounts(model_name="m", prefix="tramontane:", bounds=BOUNDS)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    ours.register(counts)
    tokens = Counter(
        "tramontane:generation_tokens", "Generated tokens of all sequences.", ["model_name"], registry=theirs
    )
    gaps = Histogram(
        "tramontane:inter_token_latency_seconds",
        "Seconds between two tokens of a sequence.",
        ["model_name"],
        buckets=BOUNDS,
        registry=theirs,
    )
    child_tokens, child_gaps = tokens.labels("m"), gaps.labels("m")
    for values in ((), GAPS_S):
        for gap_s in values:
            counts.num_tokens += 2
            counts.add_gap(gap_s)
            child_tokens.inc(2)
            child_gaps.observe(gap_s)
        expected = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
        assert generate_latest(ours).decode().splitlines() == expected
