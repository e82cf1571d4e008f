"""The tensors that a model of this structure has in its checkpoint: their names in both layouts, and their shapes.

Knows names and shapes; opens no file, and no torch.
"""

import re

from workers.config import ModelConfig

# Old conversions stored these, which are computed from the configuration.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|inv_freq|cos_cached|sin_cached)"
)
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
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def huggingface_name(name: str) -> str:
    """'layers.3.attention.wq.weight' is 'model.layers.3.self_attn.q_proj.weight'. Unknown names stay as they are."""
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if match is None or match[2] not in MISTRAL_NAMES:
        return name
    return f"{'model.' + match[1] if match[1] else ''}{MISTRAL_NAMES[match[2]]}.weight"


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
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes
