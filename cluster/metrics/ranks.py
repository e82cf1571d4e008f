"""The counters of ranks as Prometheus metrics. Every gateway exports them, and so does the Ray agent of every node."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from workers.rank.reports import RankStats

_RANK_COUNTERS = (
    ("rank_steps", "Engine steps the rank took part in.", "num_steps_total"),
    ("rank_step_seconds", "Seconds the rank spent in steps.", "step_s_total"),
    ("rank_all_reduces", "All-reduces the rank took part in.", "num_all_reduces_total"),
    ("rank_all_reduce_seconds", "Seconds the rank spent in all-reduces, waiting included.", "all_reduce_s_total"),
)


def rank_families(
    ranks: Iterable[tuple[str, int, RankStats]], *, prefix: str = "tramontane:", model_name: str = ""
) -> Iterator[Metric]:
    """ranks: (replica id, rank, its counters). An empty model name adds no label, as Prometheus treats empty labels as missing."""
    ranks = list(ranks)
    for name, text, field in _RANK_COUNTERS:
        family = CounterMetricFamily(prefix + name, text, labels=["model_name", "engine", "rank"])
        for replica_id, rank, stats in ranks:
            if (value := getattr(stats, field)) is not None:
                family.add_metric([model_name, replica_id, str(rank)], value)
        yield family
