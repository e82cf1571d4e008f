"""What `tramontane serve` and `generate` were asked for, checked and complete, before anything is started.

Turns options into an EngineConfig and a ServeConfig. Knows defaults that depend on the model and the device; knows no Ray and no torch.
"""

import ipaddress
import re
import socket
from argparse import Namespace
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

from cluster.cloud.notices import PreemptionNotices
from cluster.log import LogFormat, LogLevel
from workers.config import Dtype, EngineConfig, ModelConfig, load_model_config
from workers.errors import ConfigError

Device = Literal["cpu", "cuda"]
API_KEY_ENV = "TRAMONTANE_API_KEY"
BATCH_STORE_ENV = "TRAMONTANE_BATCH_STORE"
# FlashAttention's paged kernel takes blocks in multiples of 256; on the CPU small blocks share more prefixes.
BLOCK_SIZES: dict[Device, int] = {"cpu": 16, "cuda": 256}
MAX_DEFAULT_MODEL_LEN = 32_768
DEFAULT_DEPLOYMENT = "tramontane"
RoutingPolicy = Literal["prefix", "least_load", "round_robin"]
ROUTING_POLICIES: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)
MetricsPrefix = Literal["tramontane", "vllm"]
METRICS_PREFIXES: tuple[MetricsPrefix, ...] = get_args(MetricsPrefix)
CHAT_TEMPLATES = ("auto", "v1", "v2", "v3", "jinja")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


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


def serve_config(args: Namespace, folder: Path, model_name: str, *, device: Device) -> ServeConfig:
    """Raises ConfigError with the sentence the user shall read."""
    return ServeConfig(
        engine=engine_config(args, folder, device=device),
        model_name=args.served_model_name or model_name,
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        ray_address=args.ray_address,
        deployment=args.name,
        min_replicas=args.replicas[0],
        max_replicas=args.replicas[1],
        num_gateways=args.gateways,
        routing_policy=args.routing_policy,
        max_queued_tokens=args.max_queued_tokens,
        queue_timeout_s=args.queue_timeout,
        ttft_objective_s=args.ttft_objective,
        scale_down_after_s=args.scale_down_after,
        drain_timeout_s=args.drain_timeout,
        chat_template=chat_template(args.chat_template),
        metrics_prefix=args.metrics_prefix,
        log_level=args.log_level,
        log_format=args.log_format,
        log_prompts=args.log_prompts,
        serves_embeddings=not args.no_embeddings,
        serves_batches=not args.no_batches,
        data_dir=_absolute(args.data_dir),
        batch_store=args.batch_store,
        api_keys=_absolute(args.api_keys),
        tls_cert=_absolute(args.tls_cert),
        tls_key=_absolute(args.tls_key),
        cors_origins=tuple(args.cors_origin or ()),
        preemption_notices=args.preemption_notices,
    )


def chat_template(asked: str) -> str:
    """One of CHAT_TEMPLATES, or a .jinja file's absolute path. Raises ConfigError."""
    if asked in CHAT_TEMPLATES:
        return asked
    path = Path(asked).expanduser().absolute()
    if not asked.endswith(".jinja") or not path.is_file():
        raise ConfigError(
            f"--chat-template {asked} is neither a .jinja file that exists nor one of {', '.join(CHAT_TEMPLATES)}."
        )
    return str(path)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def parse_replicas(text: str) -> tuple[int, int]:
    """ "2" is exactly two, "1:4" one to four, "0:4" none while nobody asks. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if high < 1 or low > high:
        raise ValueError(f"{text!r} is no number of replicas; write N, or MIN:MAX with MAX at least 1, as in 2 or 0:4")
    return low, high


def url_of(host: str, port: int, *, scheme: str = "http") -> str:
    """Where a browser on this machine finds a server bound to `host`."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{shown}:{port}"


def engine_config(args: Namespace, folder: Path, *, device: Device) -> EngineConfig:
    """One replica's engine. Raises ConfigError."""
    model = load_model_config(folder)
    max_model_len = args.max_model_len
    if max_model_len is None:
        max_model_len = min(model.max_position_embeddings, MAX_DEFAULT_MODEL_LEN)
    elif max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model was made for; use at most {model.max_position_embeddings}."
        )
    given = {
        "num_kv_blocks": args.num_kv_blocks,
        "kv_cache_bytes": args.kv_cache_memory,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }
    return EngineConfig(
        model_path=str(folder),
        tokenizer_path=_tokenizer_path(folder),
        model=model,
        device=device,
        dtype=choose_dtype(args.dtype, model, device=device),
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=max_model_len,
        block_size=args.block_size or BLOCK_SIZES[device],
        gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=not args.no_prefix_caching,
        **{name: value for name, value in given.items() if value is not None},
    )


def _tokenizer_path(folder: Path) -> str | None:
    from cluster.text.tokenizer import find_tokenizer  # late: SentencePiece is not needed to refuse an option

    try:
        return str(find_tokenizer(folder))
    except ConfigError:  # whoever needs the text says so; token ids do without
        return None


def choose_dtype(asked: Literal["auto"] | Dtype, model: ModelConfig, *, device: Device) -> Dtype:
    """auto: the checkpoint's own type on CUDA; float32 on the CPU, which computes it fastest."""
    if asked != "auto":
        return asked
    return model.dtype if device == "cuda" else "float32"


def detect_device(asked: Literal["auto", "cpu", "cuda"]) -> Device:
    """cuda if this machine has a GPU and torch was built for it; looks, without importing torch. Raises ConfigError."""
    try:
        has_cuda_build = "+cpu" not in version("torch")
    except PackageNotFoundError:
        has_cuda_build = False
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    if asked == "cuda" and not (has_gpu and has_cuda_build):
        what = "this machine has no NVIDIA GPU" if not has_gpu else "the installed torch is a CPU-only build"
        raise ConfigError(f"--device cuda cannot work: {what}; use --device cpu or leave it out.")
    if asked == "auto":
        return "cuda" if has_gpu and has_cuda_build else "cpu"
    return asked


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`; a name counts if every address of it is loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)} if host else set()
    except OSError as e:
        raise ConfigError(f"--host {host} is neither an address nor a name that resolves.") from e
    return bool(addresses) and all(ipaddress.ip_address(a).is_loopback for a in addresses)


def check_port_is_free(host: str, port: int, *, shared: bool = False) -> None:
    """Raises ConfigError when something listens there already, before the minutes of start-up are spent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ConfigError(
                f"Port {port} on {host} cannot be used ({e.strerror}); choose another with --port."
            ) from e


def parse_bytes(text: str) -> int:
    """ "4GiB", "500MB", "1.5g" or plain bytes. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 4GiB or 500MB")
    amount = int(float(match[1]) * _UNITS[match[2]])
    if amount < 1:
        raise ValueError(f"{text!r} is no memory at all")
    return amount
