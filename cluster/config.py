"""What `tramontane serve` and `generate` were asked for, checked and complete, before anything is started.

Turns options into an EngineConfig and a ServeConfig. Knows defaults that depend on the model and the device; knows no Ray and no torch.
"""

import ipaddress
import re
import socket
from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from workers.config import Dtype, EngineConfig, ModelConfig, load_model_config
from workers.errors import ConfigError

Device = Literal["cpu", "cuda"]
API_KEY_ENV = "TRAMONTANE_API_KEY"
# FlashAttention's paged kernel takes blocks in multiples of 256; on the CPU small blocks share more prefixes.
BLOCK_SIZES: dict[Device, int] = {"cpu": 16, "cuda": 256}
MAX_DEFAULT_MODEL_LEN = 32_768
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All of the gateway's side. `port` 0 takes a free one."""

    engine: EngineConfig
    model_name: str
    host: str
    port: int
    api_key: str | None
    ray_address: str | None
    drain_timeout_s: float
    log_level: str

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port {self.port} is not a port; use 1 to 65535, or 0 for any free one.")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"--drain-timeout {self.drain_timeout_s:g} is negative; use 0 to stop at once.")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ConfigError(
                "The API key is empty or has spaces or non-ASCII characters in it; use printable ASCII only."
            )
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} would open the server to the network without a key; add --api-key KEY, "
                f"set {API_KEY_ENV}, or leave --host at 127.0.0.1."
            )


def serve_config(args: Namespace, folder: Path, model_name: str, *, device: Device) -> ServeConfig:
    """Raises ConfigError with the sentence the user shall read."""
    return ServeConfig(
        engine=engine_config(args, folder, device=device),
        model_name=args.served_model_name or model_name,
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        ray_address=args.ray_address,
        drain_timeout_s=args.drain_timeout,
        log_level=args.log_level,
    )


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


def check_port_is_free(host: str, port: int) -> None:
    """Raises ConfigError when something listens there already, before the minutes of start-up are spent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
