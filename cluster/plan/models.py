"""The model of a plan: its configuration and the size of its weights, without downloading them.

The Mistral 7B family is built in, so a plan for it needs no network. A local folder is read; for any other Hub id only the configuration
file is downloaded. Knows no GPU.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config.checkpoint_check import examine_checkpoint
from cluster.config.checkpoint_location import resolve_config, resolve_model
from workers.checkpoint.model_config import load_model_config
from workers.config import ModelConfig

V0_1 = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    sliding_window=4096,
    max_position_embeddings=32_768,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
    layout="huggingface",
)
V0_2 = replace(V0_1, rope_theta=1_000_000.0, sliding_window=None)
V0_3 = replace(V0_2, vocab_size=32_768)
FAMILY = {
    "mistralai/Mistral-7B-v0.1": V0_1,
    "mistralai/Mistral-7B-Instruct-v0.1": V0_1,
    "mistral-community/Mistral-7B-v0.2": V0_2,
    "mistralai/Mistral-7B-Instruct-v0.2": V0_2,
    "mistralai/Mistral-7B-v0.3": V0_3,
    "mistralai/Mistral-7B-Instruct-v0.3": V0_3,
}


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """folder, checkpoint_bytes: the path of a local checkpoint, a folder or a GGUF file, and the size of its weight files; both None for a
    model on the Hub. gguf_file: the option.

    left_out: the tensors that are not loaded. warnings: what keeps the local checkpoint from being served as it is.
    """

    name: str
    config: ModelConfig
    revision: str | None = None
    gguf_file: str | None = None
    folder: Path | None = None
    checkpoint_bytes: int | None = None
    left_out: str | None = None
    warnings: tuple[str, ...] = ()


def describe_model(model: str, *, revision: str | None = None, gguf_file: str | None = None) -> PlannedModel:
    """Raises ConfigError for a model that does not exist or is not supported, CheckpointError for a folder without its weight files."""
    if not Path(model).expanduser().exists():
        if revision is None and gguf_file is None and model in FAMILY:
            return PlannedModel(name=model, config=FAMILY[model])
        config = load_model_config(resolve_config(model, revision=revision, gguf_file=gguf_file))
        left_out = "the tensors for images" if config.has_vision else None
        return PlannedModel(name=model, config=config, revision=revision, gguf_file=gguf_file, left_out=left_out)
    folder, _ = resolve_model(model, gguf_file=gguf_file)
    found = examine_checkpoint(folder)
    if found.config is None or not found.num_files:
        raise found.faults[0]
    return PlannedModel(
        name=model,
        config=found.config,
        gguf_file=gguf_file,
        folder=folder,
        checkpoint_bytes=found.num_bytes,
        left_out=found.left_out,
        warnings=tuple(str(fault) for fault in found.faults),
    )
