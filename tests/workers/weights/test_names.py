"""Tensor names of both layouts, also of checkpoints whose language model is a part of a model with images."""

import pytest

from workers.weights.names import name_in_model


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("vision_tower.patch_conv.weight", None),
        ("model.vision_tower.ln_pre.weight", None),
        ("multi_modal_projector.linear_1.bias", None),
        ("model.rotary_emb.inv_freq", None),
        ("model.vision.weight", "model.vision.weight"),
    ],
)
def test_names_of_hugging_face(name, known_as):
    assert name_in_model(name, "huggingface") == known_as


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("layers.3.attention.wq.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("output.weight", "lm_head.weight"),
        ("vision_encoder.transformer.layers.0.attention.wq.weight", None),
        ("vision_language_adapter.w_in.weight", None),
        ("patch_merger.merging_layer.weight", None),
        ("pre_mm_projector_norm.weight", None),
        ("rope.freqs", None),
    ],
)
def test_names_of_mistral(name, known_as):
    assert name_in_model(name, "mistral") == known_as
