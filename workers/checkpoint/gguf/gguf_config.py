"""The metadata of a GGUF file as a ModelConfig. Knows llama.cpp's keys; no weights, but for the 64 numbers that llama3 rope scaling leaves.

llama.cpp's converter writes Mistral and Llama models under one architecture, "llama". It writes the embedding as `token_embd`, and no
`output` where the head is tied to it.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.checkpoint.gguf.gguf_fields import Fields
from workers.checkpoint.gguf.gguf_file import GgufHeader, GgufTensor, gguf_files, read_gguf
from workers.checkpoint.gguf.gguf_rope import read_gguf_rope
from workers.checkpoint.gguf.gguf_stored import EMBEDDING, HEAD, read_stored
from workers.checkpoint.numbers import distinct, head_size, layer_windows
from workers.checkpoint.regular_file import shown
from workers.config import Dtype, ModelConfig
from workers.errors import CheckpointError, ConfigError

ARCHITECTURES = ("llama", "mistral3")
ROPE_FACTORS = "rope_freqs.weight"
_END_TOKENS = ("eos", "eot", "eom")
_NOT_SUPPORTED = (
    "attention.clamp_kqv",
    "attention.scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
_OTHER_MODELS = "Use a GGUF file of a dense Mistral or Llama model; such files have the architecture {}."


def load_gguf_config(file: Path) -> ModelConfig:
    """file: the first part, if the model is split. Raises ConfigError, and CheckpointError for a damaged or missing part."""
    return model_from_gguf(read_parts(file))


def read_parts(file: Path) -> GgufHeader:
    """The metadata of the first part, and the tensors of all. Raises CheckpointError for a tensor in two parts."""
    files = gguf_files(file)
    first = read_gguf(files[0])
    if (count := first.metadata.get("split.count", 1)) not in (0, len(files)):
        raise CheckpointError(
            f"{files[0]} is one of {shown(count)} parts, but its name says that there are {len(files)}.",
            remedy="Give the parts the names that they were published under, like model-00001-of-00003.gguf.",
        )
    tensors = dict(first.tensors)
    header_bytes = first.header_bytes
    for part in files[1:]:
        header = read_gguf(part)
        header_bytes += header.header_bytes
        if repeated := next((name for name in header.tensors if name in tensors), None):
            raise CheckpointError(
                f"Tensor {repeated!r} is in both {tensors[repeated].path} and {part.name}.",
                remedy="The parts come from different models. Download them again.",
            )
        tensors |= header.tensors
    return GgufHeader(metadata=first.metadata, tensors=tensors, header_bytes=header_bytes)


def model_from_gguf(header: GgufHeader) -> ModelConfig:
    """Raises ConfigError for a missing or unusable field, and for a model of another structure."""
    fields = header.metadata
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConfigError(
            f"The GGUF file's architecture {shown(arch)} is not supported.",
            remedy=_OTHER_MODELS.format(" or ".join(map(repr, ARCHITECTURES))),
            param="general.architecture",
        )
    model = Fields(fields, str(arch))
    _refuse_other_structures(model)
    heads = model.whole("attention.head_count")
    hidden_size = model.whole("embedding_length")
    kv_heads = model.get("attention.head_count_kv")
    head_dim = model.get("attention.key_length")
    if head_dim is None:
        head_dim = head_size(hidden_size, heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := model.get(key)) is not None and found != head_dim:
            raise ConfigError(
                f"The GGUF file's {model.key(key)} is {shown(found)} and its head size {shown(head_dim)}, which is not supported.",
                remedy="Use a model that rotates all of a head, and whose keys and values have the same size.",
                param=model.key(key),
            )
    rope = read_gguf_rope(model, factors=_rope_factors(header.tensors.get(ROPE_FACTORS)))
    bos = fields.get("tokenizer.ggml.bos_token_id")
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in _END_TOKENS]
    eos = distinct([i for i in ends if i is not None]) or (2,)
    return ModelConfig(
        vocab_size=_vocab_size(model, header.tensors.get(EMBEDDING)),
        hidden_size=hidden_size,
        intermediate_size=model.whole("feed_forward_length"),
        num_hidden_layers=model.whole("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else model.whole("attention.head_count_kv"),
        head_dim=head_dim,
        rms_norm_eps=model.number("attention.layer_norm_rms_epsilon"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        query_scaling=rope.query_scaling,
        sliding_window=_window(model),
        max_position_embeddings=model.whole("context_length"),
        tie_word_embeddings=HEAD not in header.tensors,
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        mlp_bias="blk.0.ffn_up.bias" in header.tensors,
        bos_token_id=eos[0] if bos is None else bos,
        eos_token_ids=eos,
        dtype=stored_dtype(header.tensors),
        layout="gguf",
        stored=read_stored(header.tensors),
    )


def stored_dtype(tensors: Mapping[str, GgufTensor]) -> Dtype:
    """The type to compute in: that of most of the matrices' bytes; bfloat16 for quantised ones, which are less precise than it."""
    sizes: dict[Dtype, int] = {"float32": 0, "float16": 0, "bfloat16": 0}
    names: dict[str, Dtype] = {"F32": "float32", "F16": "float16"}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            sizes[names.get(tensor.dtype, "bfloat16")] += tensor.end - tensor.start
    return max(sizes, key=lambda dtype: sizes[dtype])


def _refuse_other_structures(model: Fields) -> None:
    """Raises ConfigError for what this engine does not compute."""
    if model.get("expert_count"):
        raise ConfigError(
            f"The GGUF file has a mixture of {shown(model.get('expert_count'))} experts, which is not supported.",
            remedy="Use a dense model.",
            param=model.key("expert_count"),
        )
    for name in _NOT_SUPPORTED:
        if model.get(name):
            raise ConfigError(
                f"The GGUF file has {model.key(name)}, which is not supported.",
                remedy="Use a plain Mistral or Llama model.",
                param=model.key(name),
            )


def _vocab_size(model: Fields, embedding: GgufTensor | None) -> Any:
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    return model.whole("vocab_size")


def _window(model: Fields) -> Any:
    """Of all layers, or a tuple if a list says which layers have it."""
    window, pattern = model.get("attention.sliding_window") or None, model.get("attention.sliding_window_pattern")
    if pattern is None or window is None:
        return window
    if not isinstance(pattern, list) or len(pattern) != model.whole("block_count"):
        raise ConfigError(
            f"The GGUF file's {model.key('attention.sliding_window_pattern')} is {shown(pattern)}, which does not say yes or no for "
            "each layer.",
            remedy="Use a file that llama.cpp's converter made.",
            param=model.key("attention.sliding_window_pattern"),
        )
    return layer_windows([window if slides else None for slides in pattern])


def _rope_factors(tensor: GgufTensor | None) -> tuple[float, ...] | None:
    """One for each pair of a head's numbers. Raises ConfigError for a tensor that is not plain floats."""
    if tensor is None:
        return None
    if tensor.dtype != "F32" or len(tensor.shape) != 1:
        raise ConfigError(
            f"The tensor {ROPE_FACTORS} in {tensor.path} is of type {tensor.dtype} and shape {list(tensor.shape)}, not a list of float32.",
            remedy="Use a file that llama.cpp's converter made.",
        )
    with tensor.path.open("rb") as f:
        f.seek(tensor.start)
        return struct.unpack(f"<{tensor.shape[0]}f", f.read(tensor.end - tensor.start))
