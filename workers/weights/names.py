"""The tensors that a model of this structure has in its checkpoint: their names in both layouts, and their shapes.

Knows names and shapes; opens no file, and no torch.
"""

import re

from workers.model_numbers import Layout, ModelConfig
from workers.weights.gguf import names as gguf_names

# Old conversions stored these, which are computed from the configuration.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|inv_freq|cos_cached|sin_cached)"
)
# Of an encoder of images, in both layouts.
VISION = re.compile(
    r"((model\.)?(vision_tower|multi_modal_projector)|vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..+"
)
# Where the language model is a part: "language_model.model.norm.weight", or as transformers 5 keeps it "model.language_model.norm.weight".
_WITHIN = re.compile(r"language_model\.(model\.|lm_head\.)|model\.language_model\.")
MISTRAL_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Of its fp8 checkpoints.
MISTRAL_SUFFIXES = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def name_in_model(name: str, layout: Layout) -> str | None:
    """A tensor's name in Hugging Face's checkpoints of a plain language model. None for what the language model does not need."""
    if layout == "gguf":
        return None if gguf_names.BUFFERS.fullmatch(name) else gguf_names.huggingface_name(name)
    if BUFFERS.fullmatch(name) or VISION.fullmatch(name):
        return None
    if layout == "mistral":
        return huggingface_name(name)
    return _WITHIN.sub(lambda match: match[1] or "model.", name, count=1) if _WITHIN.match(name) else name


def huggingface_name(name: str) -> str:
    """'layers.3.attention.wq.weight' is 'model.layers.3.self_attn.q_proj.weight'. Unknown names stay as they are.

    What a quantised matrix has beside its weight keeps its name, except for Mistral's own two: 'norm.qscale_act' is 'norm.input_scale'.
    """
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(\w+)", name)
    if match is None or match[2] not in MISTRAL_NAMES:
        return name
    suffix = MISTRAL_SUFFIXES.get(match[3], match[3])
    return f"{'model.' + match[1] if match[1] else ''}{MISTRAL_NAMES[match[2]]}.{suffix}"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of every tensor that the model needs. A tied head is the embedding."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    biases = [name for name in layer if name.startswith("self_attn.") and config.attention_bias]
    biases += [name for name in layer if name.startswith("mlp.") and config.mlp_bias]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"model.layers.{i}.{name}.bias": layer[name][:1] for name in biases}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes
