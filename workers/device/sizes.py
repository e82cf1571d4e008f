"""The engine sizes that suit a device: how many sequences at once, how many tokens a step, and how many of those for batches.

Pure functions of a GPU's memory and compute capability. What an option sets is never changed. Knows no torch and no model.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from workers.config import CPU_BACKGROUND_TOKENS, EngineConfig
from workers.device.probe import CudaDevice

GIB = 1 << 30
HOPPER = (9, 0)
MAX_NUM_SEQS = 256
# The sizes that a device decides where no option does. Fields of EngineConfig and of Sizes.
DEVICE_SIZES = ("max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """As the fields of EngineConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_background_tokens: int


def sizes_of_gpu(*, memory_bytes: int, compute_capability: tuple[int, int]) -> Sizes:
    """The defaults on a GPU.

    | memory          | tokens a step            | of these for batches |
    |-----------------|--------------------------|----------------------|
    | below 32 GiB    | 2,048                    | 64                   |
    | below 64 GiB    | 4,096                    | 128                  |
    | 64 GiB and more | 4,096; 8,192 from Hopper | 128; 256 from Hopper |

    More tokens a step make prompts cheaper, but every running stream waits for the step, and its activations take memory from the KV
    cache: with 7B weights, 140 KB a token. At its full matrix rate an A10G (70 TFLOP/s) computes 2,048 tokens of a 7B model in 0.4 s, an
    A100 (312) 4,096 in 0.2 s, and an H100 (989) 8,192 in 0.1 s; an A100 has the memory for 8,192, but not the speed.

    A step reads all weights anyway, which takes as long as the arithmetic of (FLOP/s over bytes/s) tokens: 117 on an A10G, 161 to 200 on an
    A100, 206 to 295 on Hopper. Batches get about half of that or, on Hopper, about all: the rest is for online requests. These are
    estimates from data sheets and were not measured.
    """
    if memory_bytes < 32 * GIB:
        tokens = 2048
    elif memory_bytes < 64 * GIB or compute_capability < HOPPER:
        tokens = 4096
    else:
        tokens = 8192
    return Sizes(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=tokens, max_background_tokens=tokens // 32)


# SMALLEST_GPU also before a replica's GPU is known.
SMALLEST_GPU = sizes_of_gpu(memory_bytes=0, compute_capability=(0, 0))
LARGEST_GPU = sizes_of_gpu(memory_bytes=1 << 50, compute_capability=HOPPER)
CPU = Sizes(
    max_num_seqs=EngineConfig.max_num_seqs,
    max_num_batched_tokens=EngineConfig.max_num_batched_tokens,
    max_background_tokens=CPU_BACKGROUND_TOKENS,
)


def decide(
    sizes: Sizes,
    *,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    max_background_tokens: int | None = None,
) -> Sizes:
    """`sizes` where an argument is None. They give way to the others, so that a step has a token for every sequence."""
    limit = max_num_batched_tokens or sizes.max_num_seqs
    seqs = max_num_seqs or min(sizes.max_num_seqs, limit)
    tokens = max_num_batched_tokens or max(sizes.max_num_batched_tokens, seqs)
    background = max_background_tokens or min(sizes.max_background_tokens, tokens)
    return Sizes(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_background_tokens=background)


def sized_for(config: EngineConfig, device: CudaDevice | None, min_over_ranks: Callable[[int], int]) -> EngineConfig:
    """What every rank of a replica runs: the sizes of the least of its GPUs. device: this rank's GPU, None on the CPU.

    min_over_ranks: a collective; it is called equally often on all ranks.
    """
    if device is None:
        return config
    own = sizes_of_gpu(memory_bytes=device.memory_bytes, compute_capability=device.compute_capability)
    least = Sizes(
        max_num_seqs=min_over_ranks(own.max_num_seqs),
        max_num_batched_tokens=min_over_ranks(own.max_num_batched_tokens),
        max_background_tokens=min_over_ranks(own.max_background_tokens),
    )
    given = {name: getattr(config, name) for name in DEVICE_SIZES if name not in config.sized_by_device}
    return replace(config, **asdict(decide(least, max_background_tokens=config.max_background_tokens, **given)))
