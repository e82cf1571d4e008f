"""The models of the comparison with peers, written once to a cache folder as Hugging Face checkpoints in bfloat16.

Knows shapes and files, no engine. Weights are random with a fixed seed. Output rows of control and byte tokens are zero, so that a
random model never answers with half a character, which servers hold back.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

SEED = 14
ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "examples" / "demo_model"


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size + 2)
        return self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_read_by_a_step(self) -> int:
        """Weights that a decode step reads: all but the embedding, of which it reads a row."""
        return self.num_parameters - self.vocab_size * self.hidden_size


LARGE = Shape(
    name="mistral-285m",
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=32_768,
)
SMALL = Shape(
    name="mistral-20m",
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=4096,
)
DEMO = "demo_model"
NAMES = (LARGE.name, SMALL.name, DEMO)


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of the model, which this call writes if it is not there. `demo_model` is a copy, for files of peers stand next to it."""
    folder = cache / name
    if not (folder / "model.safetensors").exists():
        partial = cache / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if name == DEMO:
            shutil.copytree(DEMO_MODEL, partial, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        else:
            _write(LARGE if name == LARGE.name else SMALL, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def vocab_size(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def _tokenizer(shape: Shape) -> Path:
    """Mistral's own v3 tokenizer, or the demo model's for the small vocabulary."""
    if shape.vocab_size == 4096:
        return DEMO_MODEL / "tokenizer.model.v3"
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


def _write(shape: Shape, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    hidden, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    heads = shape.num_attention_heads * shape.head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Keeps the size of activations, so that attention and products see numbers like those of a trained model.
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": matrix(shape.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": matrix(shape.vocab_size, hidden),
    }
    tensors["lm_head.weight"][: shape.vocab_size // 8] = 0
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": matrix(heads, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, heads),
            f"{layer}.mlp.gate_proj.weight": matrix(shape.intermediate_size, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(shape.intermediate_size, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, shape.intermediate_size),
            f"{layer}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **{key: getattr(shape, key) for key in shape.__dataclass_fields__ if key != "name"},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copyfile(_tokenizer(shape), folder / "tokenizer.model.v3")
