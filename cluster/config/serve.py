"""The settings of `tramontane serve`: one frozen value, checked when it is made. Its messages name options; it knows no parser, no Ray
and no torch.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.config.platform import Platform
from cluster.config.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from cluster.protocol.notice import PreemptionNotices
from cluster.protocol.routing import RoutingPolicy
from cluster.protocol.spec import ClusterSpec
from cluster.system.log import LogFormat, LogLevel
from cluster.system.net import is_loopback, url_of
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.tracing.settings import TracingConfig

API_KEY_ENV = "TRAMONTANE_API_KEY"
BATCH_STORE_ENV = "TRAMONTANE_BATCH_STORE"
DEFAULT_DEPLOYMENT = "tramontane"
MetricsPrefix = Literal["tramontane", "vllm"]
METRICS_PREFIXES: tuple[MetricsPrefix, ...] = get_args(MetricsPrefix)
CHAT_TEMPLATES = ("auto", "v1", "v2", "v3", "v3-tekken", "v7", "v7-tekken", "v11", "v13", "v15", "jinja")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of one deployment and of its gateways. `port` 0 picks a free one. `deployment`: its name in Ray, see protocol/names.py.

    A default here is the command's default. Paths are absolute: a gateway on another node reads the same files at the same place.
    """

    engine: EngineConfig
    model_name: str
    max_queued_tokens: int
    queue_timeout_s: float
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    ray_address: str | None = None
    deployment: str = DEFAULT_DEPLOYMENT
    min_replicas: int = ClusterSpec.min_replicas
    max_replicas: int = ClusterSpec.max_replicas
    num_gateways: int = ClusterSpec.num_gateways
    routing_policy: RoutingPolicy = "prefix"
    ttft_objective_s: float = ClusterSpec.ttft_objective_s
    scale_down_after_s: float = ClusterSpec.scale_down_after_s
    drain_timeout_s: float = ClusterSpec.drain_timeout_s
    # In a Ray cluster that was joined. A new GPU node takes minutes until it has its image and the weights.
    placement_timeout_s: float = 1800.0
    # One of CHAT_TEMPLATES, or the absolute path of a .jinja file.
    chat_template: str = "auto"
    # "auto", "none", or the absolute path of a folder; and what was read there.
    generation_config: str = "auto"
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
    metrics_prefix: MetricsPrefix = "tramontane"
    log_level: LogLevel = "warning"
    log_format: LogFormat = "text"
    log_prompts: bool = False
    # Where spans go; None: there are none.
    tracing: TracingConfig | None = None
    serves_embeddings: bool = True
    # Whether a field of a request that has no effect is refused instead of ignored.
    strict: bool = False
    serves_batches: bool = True
    # Adapters to start with: (name, folder or Hub id).
    lora: tuple[tuple[str, str], ...] = ()
    # None: the user's own folder, see cluster/system/data_dir.py.
    data_dir: str | None = None
    # May hold a password. None: a file in the data folder.
    batch_store: str | None = field(default=None, repr=False)
    api_keys: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    # Whether /health/ready and /ping answer ready or not without a key.
    public_health: bool = False
    # The hosting platform, which authenticates callers itself. None: there is none.
    platform: Platform | None = None
    preemption_notices: PreemptionNotices = ClusterSpec.preemption_notices
    # Why --dtype auto has chosen the engine's dtype; a sentence for the person who starts it.
    dtype_reason: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(
                f"--port {self.port} is not a port.", remedy="Use 1 to 65535, or 0 for any free one.", param="--port"
            )
        if not 0 <= self.drain_timeout_s < float("inf"):
            raise ConfigError(
                f"--drain-timeout {self.drain_timeout_s:g} is negative or infinite.",
                remedy="Use a number of seconds, or 0 to stop at once.",
                param="--drain-timeout",
            )
        if not self.placement_timeout_s > 0:
            raise ConfigError(
                f"--placement-timeout {self.placement_timeout_s:g} is not a valid time.",
                remedy="Use a number of seconds above 0, or inf.",
                param="--placement-timeout",
            )
        for option, seconds in (
            ("--queue-timeout", self.queue_timeout_s),
            ("--ttft-objective", self.ttft_objective_s),
            ("--scale-down-after", self.scale_down_after_s),
        ):
            if not 0 < seconds < float("inf"):
                raise ConfigError(
                    f"{option} {seconds:g} is not a valid time.",
                    remedy="Use a number of seconds above 0.",
                    param=option,
                )
        server, *member = self.deployment.split(".", 1)
        if any(not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", name) for name in (server, *member)):
            raise ConfigError(
                f"--name {self.deployment!r} is not a valid name.",
                remedy="Use at most 42 lower-case letters, digits and hyphens.",
                param="--name",
            )
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ConfigError(
                "The API key is empty or contains spaces or non-ASCII characters.",
                remedy="Use printable ASCII characters only.",
                param="--api-key",
            )
        if not self.has_keys and not is_loopback(self.host) and self.platform is None:
            raise ConfigError(
                f"--host {self.host} would open the server to the network without a key.",
                remedy="Make keys with `tramontane keys create NAME` and add --api-keys FILE, or add --api-key KEY, "
                f"set {API_KEY_ENV}, or leave --host at 127.0.0.1.",
                param="--host",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-key", "--tls-cert") if self.tls_cert is None else ("--tls-cert", "--tls-key")
            raise ConfigError(f"{given} needs {missing} too.", remedy=f"Add {missing}.", param=missing)
        keeps_adapters = self.data_dir is not None and self.engine.enable_lora
        has_effect = keeps_adapters and self.batch_store is None
        if not (self.serves_batches or has_effect) and (self.data_dir, self.batch_store) != (None, None):
            raise ConfigError(
                "--data-dir and --batch-store have no effect with --no-batches.",
                remedy="Leave them out, or leave out --no-batches.",
                param="--no-batches",
            )
        if self.batch_store is not None and not re.match(r"postgres(ql)?://", self.batch_store):
            raise ConfigError(
                "--batch-store is not the address of a PostgreSQL database.",
                remedy="Write postgresql://USER@HOST/DATABASE.",
                param="--batch-store",
            )
        names = [name for name, _ in self.lora]
        for name in names:
            if name == self.model_name or names.count(name) > 1:
                what = "the model's own name" if name == self.model_name else "the name of two adapters"
                raise ConfigError(f"--lora {name}= is {what}.", remedy="Choose another name.", param="--lora")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]+", origin):
                raise ConfigError(
                    f"--cors-origin {origin} is not a web origin.",
                    remedy="Write it like https://example.org, without a path.",
                    param="--cors-origin",
                )
        if "*" in self.cors_origins and not self.has_keys:
            raise ConfigError(
                "--cors-origin '*' would let every web page use this server, which has no key.",
                remedy="Name the origins, or add a key.",
                param="--cors-origin",
            )

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_key is not None or self.api_keys is not None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server, and every user of this machine may use it."""
        return not self.has_keys and is_loopback(self.host)

    def url(self, port: int) -> str:
        """The server's address for a browser on this machine."""
        return url_of(self.host, port, scheme="http" if self.tls_cert is None else "https")
