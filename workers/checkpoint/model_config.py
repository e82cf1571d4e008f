"""Reads a checkpoint folder's configuration, of whichever layout its weights have. Knows file names; opens no weights."""

from pathlib import Path
from typing import Any

from workers.checkpoint.gguf.gguf_config import load_gguf_config
from workers.checkpoint.gguf.gguf_file import find_gguf
from workers.checkpoint.huggingface import model_from_config_json
from workers.checkpoint.mistral_params import model_from_params_json
from workers.checkpoint.quantization import OLD_FILES, old_quantization
from workers.checkpoint.regular_file import read_object
from workers.config import ModelConfig
from workers.errors import ConfigError


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads config.json and generation_config.json, or params.json, or the metadata of a GGUF file, which may be given itself.

    Raises ConfigError for anything missing or unsupported, and CheckpointError for a damaged GGUF file.
    """
    folder = Path(folder)
    if (gguf := find_gguf(folder)) is not None:
        return load_gguf_config(gguf)
    if not folder.is_dir():
        raise ConfigError(
            f"The model folder {folder} does not exist.", remedy="Give an existing folder.", param="MODEL"
        )
    names = [name for name in ("config.json", "params.json") if _exists(folder / name)]
    if len(names) == 2 and _has_only_consolidated(folder):
        names.reverse()
    for name in names:
        fields = read_object(folder, name)
        if fields is not None:
            if name == "config.json" and not (fields.get("quantization_config") or fields.get("compression_config")):
                old = old_quantization({old_name: read_object(folder, old_name) for old_name in OLD_FILES})
                fields = fields if old is None else {**fields, "quantization_config": old}
            generation = {} if name == "params.json" else read_object(folder, "generation_config.json")
            return _model_config(folder / name, fields, generation or {})
    raise ConfigError(
        f"{folder} has neither config.json (Hugging Face layout) nor params.json (Mistral layout).",
        remedy="Give a folder with a checkpoint in one of these layouts.",
    )


def _model_config(path: Path, fields: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    try:
        if path.name == "params.json":
            return model_from_params_json(fields)
        return model_from_config_json(fields, generation=generation)
    except KeyError as e:
        raise ConfigError(f"{path} lacks the field {e.args[0]!r}.", remedy="Download it again.") from e
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise ConfigError(
            f"{path} has a field with a value that cannot be used: {str(e)[:200]}.", remedy="Correct it."
        ) from e


def _exists(path: Path) -> bool:
    """Also a broken link and a pipe, so that `read_object` names them."""
    return path.is_symlink() or path.exists()


def _has_only_consolidated(folder: Path) -> bool:
    """Mistral's repositories hold both layouts; a part of one may hold both configurations but the weights of one."""
    return any(folder.glob("consolidated*.safetensors")) and not any(folder.glob("model*.safetensors"))
