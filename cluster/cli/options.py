"""From parsed options to configuration: an EngineConfig and a ServeConfig, checked and complete before anything starts.

Knows the defaults that depend on the model and the device. Knows no Ray and no torch.
"""

import re
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from cluster.config.engine import BLOCK_SIZES, MAX_DEFAULT_MODEL_LEN, Device
from cluster.config.serve import CHAT_TEMPLATES, ServeConfig
from workers.config import Dtype, EngineConfig, ModelConfig, load_model_config
from workers.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


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


def parse_bytes(text: str) -> int:
    """ "4GiB", "500MB", "1.5g" or plain bytes. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 4GiB or 500MB")
    amount = int(float(match[1]) * _UNITS[match[2]])
    if amount < 1:
        raise ValueError(f"{text!r} is no memory at all")
    return amount
