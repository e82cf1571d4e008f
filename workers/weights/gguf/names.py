"""llama.cpp's names of a model's tensors as Hugging Face's. Knows names only."""

import re

OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Computed from the configuration here.
BUFFERS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
# llama.cpp rotates neighboring rows of these, see `InterleavedRows`.
INTERLEAVED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")


def huggingface_name(name: str) -> str:
    """'blk.3.attn_q.weight' is 'model.layers.3.self_attn.q_proj.weight'. Unknown names stay as they are."""
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    if (match := re.fullmatch(r"(\w+)\.(weight|bias)", name)) and match[1] in OUTER_NAMES:
        return f"{OUTER_NAMES[match[1]]}.{match[2]}"
    return name
