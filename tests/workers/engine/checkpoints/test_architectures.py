"""Tiny random checkpoints in the layouts that people publish: what their configuration means, and logits against transformers.

The checkpoints are saved by transformers itself. transformers 4 wrote other fields than 5, and Mistral's own files have other names: the
tests rewrite them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints.tiny import TINY, write_tiny_checkpoint
from support.fakes.engines import make_config
from support.logits import all_logits
from support.ranks.rank_threads import run_ranks
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
)

from workers.checkpoint.model_config import load_model_config
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower

TOLERANCE = 2e-4
# More tokens than every window and first context below.
PROMPT = torch.randint(3, 256, (150,), generator=torch.Generator().manual_seed(0)).tolist()
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 14,
    "head_dim": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """config: of transformers; its other sizes are TINY's. expected: of ModelConfig. size: tensor-parallel ranks to compare as well."""

    config: type[PreTrainedConfig]
    fields: dict[str, Any]
    expected: dict[str, Any] = field(default_factory=dict)
    size: int = 1


LAYOUTS = {
    # A head_dim of its own: 5,120 / 32 is 160 in Nemo and Small, whose heads have 128.
    "Nemo": Layout(MistralConfig, {"head_dim": 16, "sliding_window": None, "rope_theta": 1e6}, {"rope_theta": 1e6}),
    "Small 24B": Layout(
        MistralConfig, {"hidden_size": 80, "head_dim": 8, "sliding_window": None, "rope_theta": 1e8}, {"head_dim": 8}, size=4
    ),
    "Zephyr": Layout(MistralConfig, {"sliding_window": 16, "rope_theta": 1e4}, {"rope_theta": 1e4, "sliding_window": 16}),
    "Codestral": Layout(
        MistralConfig,
        {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 96, "sliding_window": None, "rope_theta": 1e6},
        size=6,
    ),
    "Mathstral": Layout(MistralConfig, {"vocab_size": 264, "sliding_window": None, "rope_theta": 1e6}, {"vocab_size": 264}),
    "Ministral 8B": Layout(
        MinistralConfig,
        {
            "num_hidden_layers": 8,
            "sliding_window": 16,
            "rope_theta": 1e8,
            "layer_types": ["full_attention", *["sliding_attention"] * 3] * 2,
        },
        {"sliding_window": (None, 16, 16, 16) * 2, "layers_per_group": 2},
        size=2,
    ),
    "Ministral 3": Layout(Ministral3Config, {"rope_parameters": YARN}, {"sliding_window": None}, size=2),
    "Llama 3": Layout(LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "Llama with biases": Layout(
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
        {"attention_bias": True, "mlp_bias": True},
        size=8,
    ),
    "SmolLM2": Layout(
        LlamaConfig,
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
        size=3,
    ),
}  # fmt: skip


def save(folder: Path, layout: Layout) -> None:
    fields = {**TINY, **layout.fields}
    if "rope_theta" in fields:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(layout.config(**fields))
        randomize(model)
    model.save_pretrained(folder)


def randomize(model: torch.nn.Module) -> None:
    """What transformers leaves at 0 or 1."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)


def expected_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def our_logits(folder: Path, *, size: int = 1, chunk: int = 64) -> torch.Tensor:
    def program(tp: Any) -> torch.Tensor | None:
        config = make_config(
            folder, tensor_parallel_size=size, max_num_batched_tokens=chunk, max_num_seqs=1, enable_prefix_caching=False
        )
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        if tp.rank:
            run_follower(runner, tp)
            return None
        core = EngineCore(config, runner, tp)
        logits = all_logits(core, PROMPT)
        core.shutdown()
        return logits

    return run_ranks(size, program)[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_equal_transformers(tmp_path: Path, layout: Layout) -> None:
    save(tmp_path, layout)
    config = load_model_config(tmp_path)
    assert {name: getattr(config, name) for name in layout.expected} == layout.expected
    expected, ours = expected_logits(tmp_path), our_logits(tmp_path)
    assert (ours - expected).abs().max() <= TOLERANCE
    assert torch.equal(our_logits(tmp_path, chunk=7), ours), "the bits depend on the chunks"
    if layout.size > 1:
        assert (our_logits(tmp_path, size=layout.size) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layout", [LAYOUTS[name] for name in ("Zephyr", "Ministral 8B", "Llama 3")])
def test_the_fields_of_transformers_4_mean_the_same(tmp_path: Path, layout: Layout) -> None:
    """It had rope_theta beside rope_scaling and called the dtype torch_dtype. Ministral 8B was published as MistralForCausalLM."""
    save(tmp_path, layout)
    ours = load_model_config(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields |= {
        "rope_theta": rope.pop("rope_theta"),
        "torch_dtype": fields.pop("dtype"),
        "transformers_version": "4.46.0",
    }
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    if fields["model_type"] == "ministral":
        fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    path.write_text(json.dumps(fields))
    assert load_model_config(tmp_path) == ours
    del fields["architectures"]
    path.write_text(json.dumps(fields))
    assert load_model_config(tmp_path) == ours


def test_a_pattern_of_windows_in_params_json(tmp_path: Path) -> None:
    """Ministral 8B as Mistral publishes it: "sliding_window": [null, 16, 16, 16] for all layers."""
    fields = LAYOUTS["Ministral 8B"].fields
    for layout in ("huggingface", "mistral"):
        write_tiny_checkpoint(tmp_path / layout, layout=layout, **fields)
    path = tmp_path / "mistral" / "params.json"
    params = json.loads(path.read_text())
    path.write_text(json.dumps(params | {"sliding_window": params["sliding_window"][:4]}))
    assert load_model_config(tmp_path / "mistral").sliding_window == (None, 16, 16, 16) * 2
    expected = expected_logits(tmp_path / "huggingface")
    assert (our_logits(tmp_path / "mistral") - expected).abs().max() <= TOLERANCE


def test_the_windows_matter_in_these_comparisons(tmp_path: Path) -> None:
    """Guards the tests above: a model with one window for all layers would be far outside their tolerance."""
    save(tmp_path, LAYOUTS["Ministral 8B"])
    expected = expected_logits(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for layer_types in (["full_attention"] * 8, ["sliding_attention"] * 8):
        path.write_text(json.dumps(fields | {"layer_types": layer_types}))
        assert (our_logits(tmp_path) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("text_type", ["mistral", "ministral3"])
def test_the_language_model_of_a_model_with_images(
    tmp_path: Path, text_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Small 3.1 and Ministral 3 with their encoders of images, which are left out."""
    text = TINY | {"model_type": text_type, "sliding_window": None}
    if text_type == "ministral3":
        text["rope_parameters"] = YARN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = Mistral3Config(text_config=text, vision_config=VISION, tie_word_embeddings=False)
        model = Mistral3ForConditionalGeneration(config).eval()
        randomize(model)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    caplog.set_level("INFO", "workers.weights.safetensors")
    assert (our_logits(tmp_path) - expected).abs().max() <= TOLERANCE
    assert "tensors for images (multi_modal_projector, vision_tower)." in caplog.text
    assert load_model_config(tmp_path).has_vision
