"""The counters of ranks as Prometheus metrics. Every gateway exports them, and so does the Ray agent of every node."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from workers.rank.reports import RankStats

_RANK_COUNTERS = (
    ("rank_steps", "Engine steps the rank took part in.", "num_steps_total"),
    ("rank_step_seconds", "Seconds the rank spent in steps.", "step_s_total"),
    ("rank_all_reduces", "All-reduces the rank took part in.", "num_all_reduces_total"),
    ("rank_all_reduce_seconds", "Seconds the rank spent in all-reduces, waiting included.", "all_reduce_s_total"),
)
_GPU_GAUGES = (
    ("rank_gpu_memory_used_bytes", "Memory in use on the rank's GPU.", "used_bytes"),
    ("rank_gpu_memory_bytes", "Memory of the rank's GPU.", "total_bytes"),
    ("rank_gpu_temperature_celsius", "Temperature of the rank's GPU.", "temperature_c"),
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
    for name, text, field in _GPU_GAUGES:
        gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name", "engine", "rank", "gpu"])
        for replica_id, rank, stats in ranks:
            if stats.gpu is not None and (value := getattr(stats.gpu, field)) is not None:
                gauge.add_metric([model_name, replica_id, str(rank), stats.gpu.name], value)
        yield gauge
