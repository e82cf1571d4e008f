"""What the model is and how the engine runs it: frozen, validated values, parsed once from a checkpoint folder.

Knows both checkpoint layouts' configuration files (`config.json` of Hugging Face, `params.json` of Mistral) and refuses
what this engine cannot compute correctly. Does not know torch, weights, or what start-up learns (see
protocol.EngineFacts).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workers.errors import ConfigError

Layout = Literal["huggingface", "mistral"]
Dtype = Literal["float32", "bfloat16", "float16"]
ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# CPU: of 4 and 8 the one that keeps online requests' p99 within 1.3 times the value without a batch (benchmarks/results/batch.md). CUDA: an
# estimate from a GPU's ratio of FLOP/s to bytes/s, not measured yet.
BACKGROUND_TOKENS = {"cpu": 4, "cuda": 128}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


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
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"The checkpoint's {name} is {value!r}, not a whole number of at least 1.", param=name
                )
        for token_id in (self.bos_token_id, *self.eos_token_ids):
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"The checkpoint names {token_id!r} as a bos or eos token, but its token ids are 0 to {self.vocab_size - 1}."
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
                f"The checkpoint's sliding_window is {self.sliding_window}.",
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

    `num_kv_blocks` None: from `kv_cache_bytes` or free memory. `max_background_tokens`: see `background_tokens`.
    `tokenizer_path`: a SentencePiece model, which rank 0 needs for grammars; None refuses requests with a grammar.
    """

    model_path: str
    model: ModelConfig
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Dtype = "float32"
    tensor_parallel_size: int = 1
    max_model_len: int = 4096
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int = 1 << 30  # per rank, on the CPU
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024  # the most one step computes: long prompts are prefilled in chunks
    max_background_tokens: int | None = None
    enable_prefix_caching: bool = True
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
        return self.max_background_tokens or BACKGROUND_TOKENS[self.device]

    def __post_init__(self) -> None:
        self.model.check_tensor_parallel_size(self.tensor_parallel_size)
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
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}.",
                remedy="Use a value above 0 and up to 1.",
                param="gpu_memory_utilization",
            )


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads config.json or params.json. Raises ConfigError for anything missing or unsupported."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"The model folder {folder} does not exist.")
    for name, parse in (("config.json", _from_huggingface), ("params.json", _from_mistral)):
        path = folder / name
        if path.is_file():
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as e:
                raise ConfigError(f"{path} is not valid JSON: {e}.") from e
            if not isinstance(fields, dict):
                raise ConfigError(f"{path} is not a JSON object.")
            try:
                return parse(fields)
            except KeyError as e:
                raise ConfigError(f"{path} lacks the field {e.args[0]!r}.") from e
            except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
                raise ConfigError(f"{path} has a field with a value that cannot be used: {e}.") from e
    raise ConfigError(f"{folder} has neither config.json (Hugging Face layout) nor params.json (Mistral layout).")


def _from_huggingface(fields: dict[str, Any]) -> ModelConfig:
    architectures = fields.get("architectures") or []
    if not set(architectures) & set(ARCHITECTURES):
        raise ConfigError(
            f"Architecture {architectures} is not supported.",
            remedy=f"Use a checkpoint of {' or '.join(ARCHITECTURES)}.",
            param="architectures",
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"hidden_act {fields['hidden_act']!r} is not supported.",
            remedy="Use a checkpoint whose hidden_act is 'silu'.",
            param="hidden_act",
        )
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ConfigError(f"{name} is true, but checkpoints with biases are not supported.", param=name)
    if fields.get("quantization_config"):
        raise ConfigError(
            "Quantized checkpoints are not supported.",
            remedy="Use the float32, float16 or bfloat16 weights.",
            param="quantization_config",
        )
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(
            f"Rotary scaling {rope_type!r} is not supported.",
            remedy="Use a checkpoint with unscaled rotary embedding.",
            param="rope_scaling",
        )
    heads = fields["num_attention_heads"]
    eos = fields.get("eos_token_id", 2)
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
        rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        sliding_window=fields.get("sliding_window") if "MistralForCausalLM" in architectures else None,
        max_position_embeddings=fields["max_position_embeddings"],
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        bos_token_id=1 if fields.get("bos_token_id") is None else fields["bos_token_id"],
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (2 if eos is None else eos,),
        dtype=_dtype(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"),
        layout="huggingface",
    )


def _from_mistral(fields: dict[str, Any]) -> ModelConfig:
    if fields.get("model_type", "transformer") != "transformer":
        raise ConfigError(
            f"model_type {fields['model_type']!r} is not supported.",
            remedy="Use a checkpoint whose model_type is 'transformer'.",
            param="model_type",
        )
    for name in ("moe", "quantization", "lora", "vision_encoder", "yarn", "rope_scaling"):
        if fields.get(name):
            raise ConfigError(
                f"params.json has {name!r}, which is not supported.",
                remedy="Use a dense, unquantized checkpoint.",
                param=name,
            )
    heads = fields["n_heads"]
    window = fields.get("sliding_window")
    # Files without rope_theta follow mistral-inference's rule: 10,000 for v0.1, which has a window, 1,000,000 for later versions.
    rope_theta = fields.get("rope_theta") or (1_000_000.0 if window is None else 10_000.0)
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["dim"],
        intermediate_size=fields["hidden_dim"],
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("n_kv_heads") or heads,
        head_dim=fields.get("head_dim") or fields["dim"] // heads,
        rms_norm_eps=fields.get("norm_eps", 1e-5),
        rope_theta=float(rope_theta),
        sliding_window=window,
        max_position_embeddings=fields.get("max_seq_len") or fields.get("max_position_embeddings") or 32_768,
        tie_word_embeddings=bool(fields.get("tied_embeddings", False)),
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype="bfloat16",
        layout="mistral",
    )


def _dtype(name: str) -> Dtype:
    name = name.removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"Weights of type {name!r} are not supported.",
            remedy="Use float32, float16 or bfloat16 weights.",
            param="dtype",
        )
    return name  # type: ignore[return-value]
