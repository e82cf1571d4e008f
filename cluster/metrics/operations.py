"""What an operator asks first about one gateway, as plain numbers for the web page: waiting times, responses by status, tokens by key.

Reads a gateway's own registry, so it says what Prometheus would. Counts are since the gateway's start; the page shows differences between
two readings. Knows no HTTP.
"""

import msgspec

from cluster.metrics.gateway import Metrics

# Not what the page, probes and scrapes ask all the time.
_REQUESTS = ("/v1/", "/openai/", "/invocations", "unknown")


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram: how many values there were up to each bound, in seconds. The last number is of all."""

    bounds: list[float]
    counts: list[float]


class KeyTokens(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_prompt_tokens: int
    num_output_tokens: int


class Operations(msgspec.Struct, frozen=True, kw_only=True):
    """`responses`: HTTP status -> how many. `num_failovers`: sequences that continued on another replica. `links`: name -> address."""

    first_token: Distribution
    between_tokens: Distribution
    responses: dict[str, int]
    num_failovers: int
    keys: list[KeyTokens]
    links: dict[str, str]


def operations(metrics: Metrics, *, links: dict[str, str]) -> Operations:
    samples = [(s.name.removeprefix(metrics.prefix), s) for f in metrics.registry.collect() for s in f.samples]

    def distribution(name: str) -> Distribution:
        found: dict[float, float] = {}  # of all models together
        for sample in (s for n, s in samples if n == f"{name}_bucket"):
            bound = float(sample.labels["le"])
            found[bound] = found.get(bound, 0.0) + sample.value
        counts = sorted(found.items())
        return Distribution(bounds=[bound for bound, _ in counts[:-1]], counts=[count for _, count in counts])

    responses: dict[str, int] = {}
    keys: dict[str, dict[str, int]] = {}
    num_failovers = 0
    for name, sample in samples:
        if name == "http_requests_total" and sample.labels["path"].startswith(_REQUESTS):
            status = sample.labels["status"]
            responses[status] = responses.get(status, 0) + int(sample.value)
        elif name == "key_tokens_total":
            keys.setdefault(sample.labels["key"], {})[sample.labels["kind"]] = int(sample.value)
        elif name == "num_failovers_total":
            num_failovers += int(sample.value)
    return Operations(
        first_token=distribution("time_to_first_token_seconds"),
        between_tokens=distribution("inter_token_latency_seconds"),
        responses=dict(sorted(responses.items())),
        num_failovers=num_failovers,
        keys=[
            KeyTokens(
                name=name,
                num_prompt_tokens=kinds.get("prompt", 0),
                num_output_tokens=kinds.get("output", 0),
            )
            for name, kinds in sorted(keys.items(), key=lambda item: -sum(item[1].values()))
        ],
        links=links,
    )
