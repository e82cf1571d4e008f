"""How the engine runs a model: frozen, validated values. What the model is: see model_numbers.py.

Does not know torch, weights, or what start-up learns (see protocol.EngineFacts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigError
from workers.model_numbers import Dtype as Dtype
from workers.model_numbers import ModelConfig as ModelConfig
from workers.rank_shares import bounds_of
from workers.stored_weights import why_not_divided

Quantization = Literal["int8", "int4", "fp8"]
KVCacheDtype = Literal["auto", "int8", "fp8"]
AttentionChoice = Literal["auto", "native", "triton", "flash", "sdpa"]
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# A quantized matrix keeps each row in groups of so many numbers of 8 or 4 bits, and a scale of two bytes for each group. 8-bit floats have
# one scale for each row, which is not counted.
QUANTIZATION_GROUP_SIZE = 32
QUANTIZATION_GROUP_BYTES: dict[Quantization, int] = {"int8": 32 + 2, "int4": 16 + 2, "fp8": 32}
# Of an adapter.
MAX_LORA_RANK = 256
# Of a key or value in 8 bits, in float32.
KV_SCALE_BYTES = 4
# Of 4 and 8 the one that keeps online requests' p99 within 1.3 times the value without a batch (benchmarks/batch.md).
CPU_BACKGROUND_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one replica runs. Sizes are tokens unless named otherwise.

    `dtype`: of the weights and of everything computed from them. `quantization`: weight matrices are kept in fewer bits; the
    embedding, norms and a tied head stay in `dtype`.
    `narrow_weights`: matrices in float32 take two bytes for a weight, because the checkpoint is in bfloat16, and the compiled kernels keep
    a matrix that bfloat16 holds exactly as that. For the arithmetic of memory only: they see themselves which they can keep so.
    `kv_cache_dtype`: keys and values in 8 bits, with a scale for each token and KV head; auto: in `dtype`.
    `num_kv_blocks` None: from `kv_cache_bytes` or free memory. `max_background_tokens`: see `background_tokens`. `prompt_stretch`: how many
    times as long as a step that only decodes one may take that also computes prompts, on the CPU (engine/scheduling/prompt_pace.py).
    `sized_by_device`: the sizes that no option set; on CUDA each rank sets them for its GPU (device/sizes.py).
    `overlap`: whether a step is launched before the tokens of the last one are read. None: on CUDA, where the GPU would wait for the
    host otherwise.
    `cuda_graphs`: whether decode steps are captured as graphs, which changes no token; on the CPU, as lists of kernel calls.
    `deterministic`: on CUDA, a token's logits do not depend on what is computed along with it, on the chunking and on the replica, at
    the price of slower products. On the CPU in float32 this is always so.
    `tokenizer_path`: the tokenizer's file, which rank 0 needs for grammars; None refuses requests with a grammar.
    `enable_lora`: requests may name LoRA adapters. `max_loras`: on the device at a time, so distinct ones in one step. `max_lora_rank`:
    the largest rank of an adapter, which sizes their slots on CUDA.
    """

    model_path: str
    model: ModelConfig
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    narrow_weights: bool = False
    kv_cache_dtype: KVCacheDtype = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int = 4096
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int = 1 << 30  # per rank, on the CPU
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024  # the most one step computes: long prompts are prefilled in chunks
    max_background_tokens: int | None = None
    prompt_stretch: float = 5.0
    sized_by_device: tuple[str, ...] = ()
    enable_prefix_caching: bool = True
    deterministic: bool = False
    overlap: bool | None = None
    cuda_graphs: bool = True
    attention_backend: AttentionChoice = "auto"
    tokenizer_path: str | None = None
    enable_lora: bool = False
    max_loras: int = 8
    max_lora_rank: int = 64
    num_threads: int | None = None  # torch threads per CPU rank; None divides the cores among the ranks

    @property
    def kv_head_bytes(self) -> int:
        """Bytes of one token's key or value in one KV head: of 128 numbers 512 in float32, 256 in bfloat16, 132 in 8 bits."""
        if self.kv_cache_dtype == "auto":
            return self.model.head_dim * DTYPE_BYTES[self.dtype]
        return self.model.head_dim + KV_SCALE_BYTES

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block on one rank: keys and values of this rank's KV heads in the layers of one group."""
        return self.model.layers_per_group * self.block_size * self.kv_layer_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers on one rank. A 7B model: 256 KiB in float32, 128 in bfloat16, 66 in 8 bits."""
        return self.model.num_hidden_layers * self.kv_layer_bytes

    @property
    def kv_layer_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer on one rank."""
        return 2 * self.model.kv_heads_per_rank(self.tensor_parallel_size) * self.kv_head_bytes

    def num_kv_blocks_within(self, num_bytes: int) -> int:
        """Usable KV blocks in `num_bytes` of one rank's memory; less than 1 where there is room for none.

        Counts one more for the null block, and no more than could ever be in use at once.
        """
        most_useful = self.max_num_seqs * -(-self.max_model_len // self.block_size) * len(self.model.layer_groups)
        return min(num_bytes // self.kv_block_bytes - 1, most_useful)

    @property
    def background_tokens(self) -> int:
        """The most tokens that batch lines add to a step along with online requests. By default, as many as delay a step little,
        since it has to read every weight anyway.
        """
        return self.max_background_tokens or CPU_BACKGROUND_TOKENS

    @property
    def overlaps(self) -> bool:
        """`overlap` as it is on this device."""
        return self.device == "cuda" if self.overlap is None else self.overlap

    @property
    def weight_form(self) -> str | None:
        """What the weight matrices are kept as, for `describe_dtype`; None where it is `dtype`."""
        stored = self.model.stored
        if self.quantization is not None or stored is None:
            return self.quantization
        return stored.cpu_label if self.device == "cpu" else stored.label

    def __post_init__(self) -> None:
        self.model.check_tensor_parallel_size(self.tensor_parallel_size)
        if self.quantization is not None:
            _check_quantization(self, self.quantization)
        check_division(self.model, self.tensor_parallel_size, quantization=self.quantization)
        for name in (
            "max_model_len",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_bytes",
            "max_loras",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}.", remedy="Use at least 1.", param=name)
        if not self.prompt_stretch > 1:
            raise ConfigError(
                f"prompt_stretch is {self.prompt_stretch:g}.", remedy="Use more than 1.", param="prompt_stretch"
            )
        for name in ("num_kv_blocks", "max_background_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}.", remedy="Use at least 1.", param=name)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than max_num_seqs ({self.max_num_seqs}), "
                "so running requests could not all advance in one step.",
                remedy="Raise max_num_batched_tokens or lower max_num_seqs.",
                param="max_num_batched_tokens",
            )
        if not 1 <= self.max_lora_rank <= MAX_LORA_RANK:
            raise ConfigError(
                f"max_lora_rank is {self.max_lora_rank}.",
                remedy=f"Use a value from 1 to {MAX_LORA_RANK}.",
                param="max_lora_rank",
            )
        if self.deterministic and self.device == "cuda" and self.attention_backend not in ("auto", "triton"):
            raise ConfigError(
                f"--attention-backend {self.attention_backend} is not deterministic on CUDA.",
                remedy="Use --attention-backend triton, or leave out --deterministic.",
                param="--attention-backend",
            )
        if self.attention_backend == "flash" and self.kv_cache_dtype != "auto":
            raise ConfigError(
                f"--attention-backend flash does not read keys and values in {self.kv_cache_dtype}.",
                remedy="Use --attention-backend auto, or leave out --kv-cache-dtype.",
                param="--attention-backend",
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}.",
                remedy="Use a value above 0 and up to 1.",
                param="gpu_memory_utilization",
            )


def describe_dtype(dtype: str, quantization: str | None) -> str:
    """ "bfloat16", "int4 weights and bfloat16"."""
    return dtype if quantization is None else f"{quantization} weights and {dtype}"


def check_division(model: ModelConfig, size: int, *, quantization: Quantization | None = None) -> None:
    """Raises ConfigError unless `size` ranks can share this model with its weights in that form."""
    model.check_tensor_parallel_size(size)
    why = _why_not_divided(model, size, quantization)
    if why is not None:
        *others, last = map(str, sizes_that_run(model, quantization=quantization))
        sizes = f"{', '.join(others)} or {last}" if others else last
        more = "" if quantization is None else ", or leave out --quantization"
        raise ConfigError(why, remedy=f"Use --tensor-parallel-size {sizes}{more}.", param="--tensor-parallel-size")


def sizes_that_run(model: ModelConfig, *, quantization: Quantization | None = None) -> tuple[int, ...]:
    """How many ranks can share this model with its weights in that form."""
    return tuple(n for n in model.tensor_parallel_sizes if _why_not_divided(model, n, quantization) is None)


def _why_not_divided(model: ModelConfig, size: int, quantization: Quantization | None) -> str | None:
    """A sentence where ranks would cut matrices that are divided by inputs within a group."""
    width = model.num_attention_heads * model.head_dim
    bounds = {
        "attention heads' width": range(0, width + 1, width // size),
        "intermediate size": bounds_of(model.intermediate_size, size),
    }
    if model.stored is not None:
        return why_not_divided(model.stored, bounds)
    return None if quantization is None or size == 1 else _why_not_in_groups(quantization, size, bounds)


def _why_not_in_groups(quantization: Quantization, size: int, bounds: Mapping[str, Sequence[int]]) -> str | None:
    for name, places in bounds.items():
        cut = next((place for place in places[1:-1] if place % QUANTIZATION_GROUP_SIZE), None)
        if cut is not None:
            return (
                f"--quantization {quantization} does not work with this model on {size} ranks: a rank's part of its {name} would begin at "
                f"{cut}, which is not a multiple of {QUANTIZATION_GROUP_SIZE}."
            )
    return None


def _check_quantization(config: EngineConfig, method: Quantization) -> None:
    """Raises ConfigError for a checkpoint that is quantised already, and for rows that do not divide into groups."""
    model = config.model
    if model.stored is not None:
        raise ConfigError(
            f"--quantization {method} is for dense checkpoints, and this one has {model.stored.label} weights.",
            remedy="Leave it out.",
            param="--quantization",
        )
    inputs = {
        "hidden size": model.hidden_size,
        "attention heads' width": model.num_attention_heads * model.head_dim,
        "intermediate size": model.intermediate_size,
    }
    for name, in_features in inputs.items():
        if in_features % QUANTIZATION_GROUP_SIZE:
            raise ConfigError(
                f"--quantization {method} does not work with this model: its {name} is {in_features}, which is not a multiple of "
                f"{QUANTIZATION_GROUP_SIZE}.",
                remedy="Leave it out.",
                param="--quantization",
            )


def requested_num_threads(environ: Mapping[str, str]) -> int | None:
    """Threads for each CPU rank as the user's OMP_NUM_THREADS says; None where it says nothing.

    Read it in the process that the user started: Ray sets the variable in its own workers.
    """
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
