"""The counters of ranks as Prometheus metrics. Every gateway exports them, and every node's Ray agent too."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from cluster.protocol.view import RankStats

_RANK_COUNTERS = (
    ("rank_steps", "Steps the rank took part in.", "num_steps_total"),
    ("rank_step_seconds", "Time of the rank in steps.", "step_s_total"),
    ("rank_all_reduces", "All-reduces of the rank.", "num_all_reduces_total"),
    ("rank_all_reduce_seconds", "Time of the rank in all-reduces, waiting included.", "all_reduce_s_total"),
)


def rank_families(
    ranks: Iterable[tuple[str, int, RankStats]], *, prefix: str = "tramontane:", model_name: str = ""
) -> Iterator[Metric]:
    """Of (replica id, rank, its counters). An empty label is to Prometheus as no label."""
    ranks = list(ranks)
    for name, text, field in _RANK_COUNTERS:
        family = CounterMetricFamily(prefix + name, text, labels=["model_name", "engine", "rank"])
        for replica_id, rank, stats in ranks:
            if (value := getattr(stats, field)) is not None:
                family.add_metric([model_name, replica_id, str(rank)], value)
        yield family
