"""What the model is and how the engine runs it: frozen, validated values.

Refuses numbers that no model has. Does not know the files that they come from (checkpoint/), torch, weights, or what start-up learns
(see protocol.EngineFacts).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigError
from workers.layer_groups import LayerGroup, group_layers
from workers.rope import QueryScaling, RopeScaling
from workers.stored_weights import StoredWeights, check_shares

Layout = Literal["huggingface", "mistral", "gguf"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4", "fp8"]
KVCacheDtype = Literal["auto", "int8", "fp8"]
AttentionChoice = Literal["auto", "native", "triton", "flash", "sdpa"]
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# A quantized matrix keeps each row in groups of so many numbers of 8 or 4 bits, and a scale of two bytes for each group. 8-bit floats have
# one scale for each row, which is not counted.
QUANTIZATION_GROUP_SIZE = 32
QUANTIZATION_GROUP_BYTES: dict[Quantization, int] = {"int8": 32 + 2, "int4": 16 + 2, "fp8": 32}
CPU_QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "int4")
# Of a key or value in 8 bits, in float32.
KV_SCALE_BYTES = 4
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
    """The numbers that define a Mistral-structured decoder.

    `sliding_window` counts the token itself; None is full attention. A tuple has a window for each layer, and not all the same.
    `attention_bias`, `mlp_bias`: whether these projections add a bias. `has_vision`: the checkpoint also has an encoder of images, which is
    left out. `stored`: how a quantised checkpoint keeps its matrices; None for a dense one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | tuple[int | None, ...] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: Dtype
    layout: Layout
    rope_scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    has_vision: bool = False
    stored: StoredWeights | None = None

    @functools.cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        window = self.sliding_window
        return window if isinstance(window, tuple) else (window,) * self.num_hidden_layers

    @functools.cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Layers that share KV block ids; one group where all layers have the same window. The widest windows come first."""
        return group_layers(self.layer_windows)

    @property
    def layers_per_group(self) -> int:
        """Of how many layers a KV block has the keys and values."""
        return max(len(group.layers) for group in self.layer_groups)

    @functools.cached_property
    def group_of_layer(self) -> tuple[int, ...]:
        groups = {layer: i for i, group in enumerate(self.layer_groups) for layer in group.layers}
        return tuple(groups[layer] for layer in range(self.num_hidden_layers))

    @property
    def widest_window(self) -> int | None:
        return self.layer_groups[0].window

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
        windows = self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window,)
        for window in windows:
            if window is not None and (type(window) is not int or window < 1):
                raise ConfigError(
                    f"The checkpoint's sliding_window is {window!r:.60}.",
                    remedy="Use a positive number or null.",
                    param="sliding_window",
                )
        assert len(windows) in (1, self.num_hidden_layers), "a window for each layer"

    def check_tensor_parallel_size(self, size: int) -> None:
        """Raises ConfigError unless `size` ranks can share this model evenly."""
        if size in self.tensor_parallel_sizes:
            return
        heads, kv_heads, intermediate = self.num_attention_heads, self.num_key_value_heads, self.intermediate_size
        if size < 1 or heads % size:
            why = f"its {heads} attention heads do not divide evenly over the ranks"
        elif kv_heads % size and size % kv_heads:
            why = (
                f"its {kv_heads} key/value heads neither divide evenly over the ranks nor are as many ranks' in common"
            )
        else:
            why = f"its intermediate size {intermediate} does not divide evenly over the ranks, and is not padded"
        raise ConfigError(
            f"--tensor-parallel-size {size} does not work with this model: {why}.",
            remedy=f"Use one of {', '.join(map(str, self.tensor_parallel_sizes))}.",
            param="--tensor-parallel-size",
        )

    @functools.cached_property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """How many ranks can share this model. Where there are more ranks than key/value heads, several compute the same one."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        sizes = (n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))
        return tuple(n for n in sizes if self.intermediate_size % n == 0)

    def kv_heads_per_rank(self, tensor_parallel_size: int) -> int:
        return max(1, self.num_key_value_heads // tensor_parallel_size)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one replica runs. Sizes are tokens unless named otherwise.

    `dtype`: of the weights and of everything computed from them. `quantization`: weight matrices are kept in fewer bits; the
    embedding, norms and a tied head stay in `dtype`.
    `kv_cache_dtype`: keys and values in 8 bits, with a scale for each token and KV head; auto: in `dtype`.
    `num_kv_blocks` None: from `kv_cache_bytes` or free memory. `max_background_tokens`: see `background_tokens`.
    `sized_by_device`: the sizes that no option set; on CUDA each rank sets them for its GPU (device/sizes.py).
    `overlap`: whether a step is launched before the tokens of the last one are read. None: on CUDA, where the GPU would wait for the
    host otherwise.
    `cuda_graphs`: whether decode steps are captured as graphs, which changes no token; on the CPU, as lists of kernel calls.
    `deterministic`: on CUDA, a token's logits do not depend on what is computed along with it, on the chunking and on the replica, at
    the price of slower products. On the CPU in float32 this is always so.
    `tokenizer_path`: a SentencePiece model, which rank 0 needs for grammars; None refuses requests with a grammar.
    """

    model_path: str
    model: ModelConfig
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None
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
    sized_by_device: tuple[str, ...] = ()
    enable_prefix_caching: bool = True
    deterministic: bool = False
    overlap: bool | None = None
    cuda_graphs: bool = True
    attention_backend: AttentionChoice = "auto"
    tokenizer_path: str | None = None
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
        if self.model.stored is not None:
            check_shares(self.model.stored, row_parallel_inputs(self.model, self.tensor_parallel_size))
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


def row_parallel_inputs(model: ModelConfig, size: int) -> dict[str, int]:
    """One rank's inputs of the matrices that are divided by inputs, by their names in sentences."""
    return {
        "attention heads' width": model.num_attention_heads * model.head_dim // size,
        "intermediate size": model.intermediate_size // size,
    }


def _check_quantization(config: EngineConfig, method: Quantization) -> None:
    """Raises ConfigError for a device without such kernels, and for a row that does not divide into groups on every rank."""
    if config.device == "cpu" and method not in CPU_QUANTIZATIONS:
        raise ConfigError(
            f"--quantization {method} works on CUDA only.",
            remedy="Use int8, which takes as much memory, or --device cuda.",
            param="--quantization",
        )
    model, size = config.model, config.tensor_parallel_size
    if model.stored is not None:
        raise ConfigError(
            f"--quantization {method} is for dense checkpoints, and this one has {model.stored.label} weights.",
            remedy="Leave it out.",
            param="--quantization",
        )
    # A rank has all inputs of some matrices, and its part of those of the others.
    inputs = {"hidden size": model.hidden_size} | row_parallel_inputs(model, size)
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
