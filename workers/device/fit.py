"""Whether CPU ranks of one machine have the memory for their weights and KV cache, before anything is loaded.

Pure: the configuration and the memory are arguments. The weights are needed at once, and the KV cache as requests fill it. So weights
that do not fit are an error, and a KV cache that does not fit is a warning.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from workers.config import QUANTIZATION_GROUP_BYTES, EngineConfig, describe_dtype
from workers.device.memory import Memory, gigabytes
from workers.device.model_bytes import cpu_kv_cache_bytes, has_own_head, head_bytes, rotary_bytes, weight_bytes
from workers.errors import ConfigError

# What a rank's process holds before it loads a weight: Python, torch and, under Ray, its worker. Measured: 380 to 450 MB.
PROCESS_BYTES = 400_000_000
MAX_REMEDIES = 3


@dataclass(frozen=True, kw_only=True)
class RankNeed:
    """Bytes of one rank on the CPU. `kv_cache_bytes`: when the cache is full. `block_bytes`: of one KV block. `process_bytes`: of a process
    that is still to be started.
    """

    weight_bytes: int
    process_bytes: int
    kv_cache_bytes: int
    block_bytes: int

    @property
    def loaded_bytes(self) -> int:
        """What the rank holds when it is ready for the first request."""
        return self.weight_bytes + self.process_bytes

    @property
    def full_bytes(self) -> int:
        return self.loaded_bytes + self.kv_cache_bytes


def need_of(config: EngineConfig, *, has_started: bool = False) -> RankNeed:
    """has_started: whether the rank's process is there.

    A tied head counts twice: on the CPU the head has a copy of the embedding in the form that computes fastest.
    """
    copy = head_bytes(config) if config.model.tie_word_embeddings and not has_own_head(config) else 0
    return RankNeed(
        weight_bytes=weight_bytes(config) + rotary_bytes(config) + copy,
        process_bytes=0 if has_started else PROCESS_BYTES,
        kv_cache_bytes=cpu_kv_cache_bytes(config),
        block_bytes=config.kv_block_bytes,
    )


def check_fits(
    config: EngineConfig, *, num_ranks: int, memory: Memory, where: str, has_started: bool = False
) -> str | None:
    """None if `num_ranks` ranks of this configuration fit; a warning if only their full KV caches do not. Raises ConfigError with the
    numbers and what would fit, if the weights do not.

    where: how a sentence names the machine. has_started: whether the ranks' processes are there.
    """
    need = need_of(config, has_started=has_started)
    if num_ranks * need.full_bytes <= memory.available_bytes:
        return None
    free = f"{where} has {gigabytes(memory.available_bytes)} of {gigabytes(memory.total_bytes)} of memory available"
    ranks = "" if num_ranks == 1 else f"{num_ranks} ranks: "
    kind = describe_dtype(config.dtype, config.weight_form) + " (kept as bfloat16)" * config.narrow_weights
    needed = f"{ranks}weights in {kind} {gigabytes(num_ranks * need.weight_bytes)}"
    if num_ranks * need.loaded_bytes > memory.available_bytes:
        choices = list(_smaller_forms(config, num_ranks=num_ranks, memory=memory, has_started=has_started))
        choices += ["fewer replicas"] * (num_ranks > config.tensor_parallel_size)
        raise ConfigError(
            f"The model does not fit: {free}, and this needs {gigabytes(num_ranks * need.loaded_bytes)} before the first request "
            f"({needed}{'' if has_started else ', the rest for processes'}).",
            remedy=f"Use {'one of: ' * (len(choices) > 0)}{'; '.join((*choices, 'a machine with more memory'))}.",
            param="--dtype",
        )
    room = memory.available_bytes // num_ranks - need.loaded_bytes
    full = f"{needed}, KV cache {gigabytes(num_ranks * need.kv_cache_bytes)}"
    remedy = (
        f"Use --kv-cache-memory {room >> 20}MiB or less"
        if room >> 20 and room >= 2 * need.block_bytes
        else "Leave more memory free"
    )
    in_8_bits = need_of(replace(config, kv_cache_dtype="int8"), has_started=has_started)
    if config.kv_cache_dtype == "auto" and num_ranks * in_8_bits.full_bytes <= memory.available_bytes:
        remedy += f", or --kv-cache-dtype int8 ({gigabytes(num_ranks * in_8_bits.kv_cache_bytes)})"
    return (
        f"The KV cache may not fit: {free}, and this needs {gigabytes(num_ranks * need.full_bytes)} when the cache is full ({full}). "
        f"{remedy}."
    )


def _smaller_forms(config: EngineConfig, *, num_ranks: int, memory: Memory, has_started: bool) -> Iterator[str]:
    """The options with which the weights would fit, the one that changes least first."""
    changes: list[dict[str, str]] = []
    if config.quantization is None and config.dtype == "float32":
        changes.append({"dtype": "bfloat16"})
    changes += [{"quantization": method} for method in QUANTIZATION_GROUP_BYTES if method != config.quantization]
    if config.dtype == "float32":
        changes += [{"dtype": "bfloat16", "quantization": method} for method in QUANTIZATION_GROUP_BYTES]
    found = 0
    for change in changes:
        try:
            changed = replace(config, **change)  # type: ignore[arg-type]  # names and values of its own fields
            need = need_of(changed, has_started=has_started)
        except ConfigError:  # a model that cannot be quantized
            continue
        if num_ranks * need.loaded_bytes <= memory.available_bytes:
            found += 1
            options = " ".join(f"--{name} {value}" for name, value in change.items())
            yield f"{options} ({gigabytes(num_ranks * need.weight_bytes)})"
        if found == MAX_REMEDIES:
            return
