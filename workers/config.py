"""What the model is and how the engine runs it: frozen, validated values.

Refuses numbers that no model has. Does not know the files that they come from (checkpoint/), torch, weights, or what start-up learns
(see protocol.EngineFacts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigError

Layout = Literal["huggingface", "mistral"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
AttentionChoice = Literal["auto", "native", "triton", "flash", "sdpa"]
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# A quantized matrix keeps each row in groups of so many numbers of 8 or 4 bits, and a scale of two bytes for each group.
QUANTIZATION_GROUP_SIZE = 32
QUANTIZATION_GROUP_BYTES: dict[Quantization, int] = {"int8": 32 + 2, "int4": 16 + 2}
# Of 4 and 8 the one that keeps online requests' p99 within 1.3 times the value without a batch (benchmarks/batch.md).
CPU_BACKGROUND_TOKENS = 4
# The most that is believed of a checkpoint, each several times the largest of any published model. Beyond it, a number is a mistake that
# would only be noticed when memory runs out.
MAX_SIZES = {
    "vocab_size": 1 << 23,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 11,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 30,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that define a Mistral-structured decoder. `sliding_window` counts the token itself; None is full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: Dtype
    layout: Layout

    def __post_init__(self) -> None:
        for name, largest in MAX_SIZES.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                raise ConfigError(
                    f"The checkpoint's {name} is {value!r:.60}, not a whole number from 1 to {largest:,}.",
                    remedy="Correct it, or download the file again.",
                    param=name,
                )
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"The checkpoint's {name} is {getattr(self, name)!r}.", remedy="Use a number above 0.", param=name
                )
        for token_id in (self.bos_token_id, *self.eos_token_ids):
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"The checkpoint names {token_id!r:.60} as a bos or eos token, but its token ids are 0 to {self.vocab_size - 1}."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"The checkpoint has {self.num_attention_heads} attention heads, which its {self.num_key_value_heads} "
                "key/value heads do not divide.",
                param="num_key_value_heads",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"The checkpoint's head_dim is {self.head_dim}, but rotary embedding needs an even one.",
                param="head_dim",
            )
        window = self.sliding_window
        if window is not None and (type(window) is not int or window < 1):
            raise ConfigError(
                f"The checkpoint's sliding_window is {window!r:.60}.",
                remedy="Use a positive number or null.",
                param="sliding_window",
            )

    def check_tensor_parallel_size(self, size: int) -> None:
        """Raises ConfigError unless `size` ranks can share this model evenly."""
        divided = (self.num_key_value_heads, self.intermediate_size)
        fits = [n for n in TENSOR_PARALLEL_SIZES if all(number % n == 0 for number in divided)]
        if size not in fits:
            raise ConfigError(
                f"--tensor-parallel-size {size} does not work with this model: its {self.num_key_value_heads} key/value "
                f"heads and intermediate size {self.intermediate_size} must divide evenly over the ranks.",
                remedy=f"Use one of {', '.join(map(str, fits))}.",
                param="--tensor-parallel-size",
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one replica runs. Sizes are tokens unless named otherwise.

    `dtype`: of the weights and of everything computed from them. `quantization`: weight matrices are kept in fewer bits, on the CPU; the
    embedding, norms, a tied head and the KV cache stay in `dtype`.
    `num_kv_blocks` None: from `kv_cache_bytes` or free memory. `max_background_tokens`: see `background_tokens`.
    `sized_by_device`: the sizes that no option set; on CUDA each rank sets them for its GPU (device/sizes.py).
    `overlap`: whether a step is launched before the tokens of the last one are read. None: on CUDA, where the GPU would wait for the
    host otherwise.
    `cuda_graphs`: whether decode steps on CUDA are captured as graphs, which changes no token.
    `deterministic`: on CUDA, a token's logits do not depend on what is computed along with it, on the chunking and on the replica, at
    the price of slower products. On the CPU in float32 this is always so.
    `tokenizer_path`: a SentencePiece model, which rank 0 needs for grammars; None refuses requests with a grammar.
    """

    model_path: str
    model: ModelConfig
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    tensor_parallel_size: int = 1
    max_model_len: int = 4096
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int = 1 << 30  # per rank, on the CPU
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024  # the most one step computes: long prompts are prefilled in chunks
    max_background_tokens: int | None = None
    sized_by_device: tuple[str, ...] = ()
    enable_prefix_caching: bool = True
    deterministic: bool = False
    overlap: bool | None = None
    cuda_graphs: bool = True
    attention_backend: AttentionChoice = "auto"
    tokenizer_path: str | None = None
    num_threads: int | None = None  # torch threads per CPU rank; None divides the cores among the ranks

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block over all layers on one rank: keys and values of this rank's KV heads."""
        model = self.model
        heads = model.num_key_value_heads // self.tensor_parallel_size
        return 2 * model.num_hidden_layers * self.block_size * heads * model.head_dim * DTYPE_BYTES[self.dtype]

    def num_kv_blocks_within(self, num_bytes: int) -> int:
        """Usable KV blocks in `num_bytes` of one rank's memory; less than 1 where there is room for none.

        Counts one more for the null block, and no more than could ever be in use at once.
        """
        most_useful = self.max_num_seqs * -(-self.max_model_len // self.block_size)
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

    def __post_init__(self) -> None:
        self.model.check_tensor_parallel_size(self.tensor_parallel_size)
        if self.quantization is not None:
            _check_quantization(self, self.quantization)
        for name in ("max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}.", remedy="Use at least 1.", param=name)
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
        if self.deterministic and self.device == "cuda" and self.attention_backend not in ("auto", "triton"):
            raise ConfigError(
                f"--attention-backend {self.attention_backend} is not deterministic on CUDA.",
                remedy="Use --attention-backend triton, or leave out --deterministic.",
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


def _check_quantization(config: EngineConfig, method: Quantization) -> None:
    """Raises ConfigError for a device without such kernels, and for a row that does not divide into groups on every rank."""
    if config.device != "cpu":
        raise ConfigError(
            f"--quantization {method} works on the CPU only.",
            remedy="Leave it out, or use --device cpu.",
            param="--quantization",
        )
    model, size = config.model, config.tensor_parallel_size
    # A rank has all inputs of some matrices, and its part of those of the others.
    inputs = {
        "hidden size": model.hidden_size,
        "attention heads' width": model.num_attention_heads * model.head_dim // size,
        "intermediate size": model.intermediate_size // size,
    }
    for name, in_features in inputs.items():
        if in_features % QUANTIZATION_GROUP_SIZE:
            share = "" if size == 1 or name == "hidden size" else f" on each of {size} ranks"
            raise ConfigError(
                f"--quantization {method} does not work with this model: its {name} is {in_features}{share}, which is not a multiple "
                f"of {QUANTIZATION_GROUP_SIZE}.",
                remedy="Leave it out." if not share else "Leave it out, or use a smaller --tensor-parallel-size.",
                param="--quantization",
            )


def requested_num_threads(environ: Mapping[str, str]) -> int | None:
    """Threads for each CPU rank as the user's OMP_NUM_THREADS says; None where it says nothing.

    Read it in the process that the user started: Ray sets the variable in its own workers.
    """
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
