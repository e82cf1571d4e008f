"""What a folder, or a list of file names, is instead of a checkpoint that can be served: one sentence and a remedy. Opens no file."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from workers.checkpoint.gguf.gguf_file import find_gguf
from workers.errors import ConfigError

SUPPORTED = "Give a folder with config.json or params.json, safetensors weights and a tokenizer, or a GGUF file."
_CONFIGS = ("config.json", "params.json")
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_TOKENIZERS = ("tokenizer*", "tekken*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_MAX_SHOWN = 3


def check_kind(folder: Path) -> None:
    """Raises ConfigError for a folder that is not a checkpoint of a supported kind. folder: or a GGUF file."""
    if find_gguf(folder) is not None:
        return
    check_names([path.name for path in folder.iterdir()], where=str(folder))


def check_names(names: Iterable[str], *, where: str) -> None:
    """The same for the names of a folder's or a Hub repository's files. `where` names it."""
    names = sorted(name for name in names if not name.startswith("."))
    weights = _matching(names, ("*.safetensors",))
    model_weights = [name for name in weights if not name.startswith("adapter")]
    adapters = _matching(names, ("adapter_config.json", "adapter_model.*"))
    has_config = any(name in names for name in _CONFIGS)
    if not names:
        raise _refusal(f"{where} is empty.")
    if adapters and not model_weights:
        raise _refusal(
            f"{where} has a LoRA adapter ({adapters[0]}), not a model.",
            remedy="Merge the adapter into its base model, and give the folder of the merged model.",
        )
    if (ggml := _matching(names, ("*.ggml",))) and not model_weights:
        raise _refusal(f"{where} has weights in the old GGML format ({_listed(ggml)}), which is not supported.")
    if (pickles := _matching(names, _PICKLES)) and not model_weights:
        raise _refusal(
            f"{where} has the weights only as a pickle file ({_listed(pickles)}), which Tramontane does not load.",
            remedy="Convert it to safetensors.",
        )
    if has_config:
        return
    if weights:
        raise _refusal(
            f"{where} has weights ({_listed(weights)}), but neither config.json (Hugging Face layout) nor params.json "
            "(Mistral layout).",
            remedy="Put the configuration file into the same folder.",
        )
    tokenizers = _matching(names, _TOKENIZERS)
    what = f"only a tokenizer ({_listed(tokenizers)})" if tokenizers else f"no model, but {_listed(names)}"
    raise _refusal(f"{where} has {what}: neither config.json (Hugging Face layout) nor params.json (Mistral layout).")


def not_a_folder(path: Path) -> ConfigError:
    """For a file that was given instead of a folder."""
    what = (
        "a file in the old GGML format, which is not supported"
        if path.suffix == ".ggml"
        else "a file, not a model folder"
    )
    remedy = f"Give its folder, {path.parent}." if path.suffix == ".safetensors" else SUPPORTED
    return _refusal(f"{path} is {what}.", remedy=remedy)


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _refusal(message: str, *, remedy: str = SUPPORTED) -> ConfigError:
    return ConfigError(message, remedy=remedy, param="MODEL")
