"""The settings of `tramontane serve`: one frozen value, checked when it is made. Knows no command line, no Ray and no torch."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.protocol.notice import PreemptionNotices
from cluster.system.log import LogFormat, LogLevel
from cluster.system.net import is_loopback, url_of
from workers.config import EngineConfig
from workers.errors import ConfigError

API_KEY_ENV = "TRAMONTANE_API_KEY"
BATCH_STORE_ENV = "TRAMONTANE_BATCH_STORE"
DEFAULT_DEPLOYMENT = "tramontane"
RoutingPolicy = Literal["prefix", "least_load", "round_robin"]
ROUTING_POLICIES: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)
MetricsPrefix = Literal["tramontane", "vllm"]
METRICS_PREFIXES: tuple[MetricsPrefix, ...] = get_args(MetricsPrefix)
CHAT_TEMPLATES = ("auto", "v1", "v2", "v3", "jinja")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All that `serve` was asked for. `port` 0 takes a free one. `deployment`: its name in Ray, a namespace there."""

    engine: EngineConfig
    model_name: str
    host: str
    port: int
    api_key: str | None = field(repr=False)
    ray_address: str | None
    deployment: str
    min_replicas: int
    max_replicas: int
    num_gateways: int
    routing_policy: RoutingPolicy
    max_queued_tokens: int
    queue_timeout_s: float
    ttft_objective_s: float
    scale_down_after_s: float
    drain_timeout_s: float
    chat_template: str  # one of CHAT_TEMPLATES, or the absolute path of a .jinja file
    metrics_prefix: MetricsPrefix
    log_level: LogLevel
    log_format: LogFormat
    log_prompts: bool = False
    serves_embeddings: bool = True
    serves_batches: bool = True
    data_dir: str | None = None  # None: the user's own, see data_dir.py
    batch_store: str | None = field(default=None, repr=False)  # may hold a password; None: a file in the data directory
    api_keys: str | None = None  # paths are absolute: a gateway elsewhere needs the same files in the same place
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    preemption_notices: PreemptionNotices = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port {self.port} is not a port; use 1 to 65535, or 0 for any free one.")
        if not 0 <= self.drain_timeout_s < float("inf"):
            raise ConfigError(
                f"--drain-timeout {self.drain_timeout_s:g} is negative or without end; use a number of seconds, or 0 to stop at once."
            )
        for option, seconds in (
            ("--queue-timeout", self.queue_timeout_s),
            ("--ttft-objective", self.ttft_objective_s),
            ("--scale-down-after", self.scale_down_after_s),
        ):
            if not 0 < seconds < float("inf"):
                raise ConfigError(f"{option} {seconds:g} is no time to wait; use a number of seconds above 0.")
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", self.deployment):
            raise ConfigError(f"--name {self.deployment!r} cannot be used; use lower-case letters, digits and hyphens.")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ConfigError(
                "The API key is empty or has spaces or non-ASCII characters in it; use printable ASCII only."
            )
        if not self.has_keys and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} would open the server to the network without a key; make keys with `tramontane keys create "
                f"NAME` and add --api-keys FILE, or add --api-key KEY, set {API_KEY_ENV}, or leave --host at 127.0.0.1."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-key", "--tls-cert") if self.tls_cert is None else ("--tls-cert", "--tls-key")
            raise ConfigError(f"{given} needs {missing} beside it; TLS takes both.")
        if not self.serves_batches and (self.data_dir is not None or self.batch_store is not None):
            raise ConfigError("--no-batches leaves no use for --data-dir and --batch-store; leave them out.")
        if self.batch_store is not None and not re.match(r"postgres(ql)?://", self.batch_store):
            raise ConfigError(
                "--batch-store is no address of a PostgreSQL database; write postgresql://USER@HOST/DATABASE."
            )
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]+", origin):
                raise ConfigError(
                    f"--cors-origin {origin} is no origin; write it like https://example.org, without a path."
                )
        if "*" in self.cors_origins and not self.has_keys:
            raise ConfigError(
                "--cors-origin '*' would let every web page use this server, which has no key; name the origins, or add a key."
            )

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_key is not None or self.api_keys is not None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server, and whoever is on it may."""
        return not self.has_keys and is_loopback(self.host)

    def url(self, port: int) -> str:
        """Where a browser on this machine finds the server."""
        return url_of(self.host, port, scheme="http" if self.tls_cert is None else "https")
