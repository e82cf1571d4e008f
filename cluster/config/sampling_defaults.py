"""How a model's makers want it to be sampled: the values of generation_config.json that stand where a request says nothing.

Knows the file, its fields and their bounds, and vLLM's rules: `do_sample` is not read. Does not know its end tokens, which always count
(workers/checkpoint/huggingface.py), and no request.

--generation-config   the file
auto (default)        the checkpoint's, if it has one; a GGUF file has the same values in its metadata
none, vllm            none; the second is vLLM's name for it
DIR                   the one in that folder
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from workers.checkpoint.gguf.gguf_file import find_gguf, read_gguf
from workers.checkpoint.regular_file import read_object, shown
from workers.errors import ConfigError

FILE = "generation_config.json"
OPTION = "--generation-config"
# vLLM calls it so.
_NONE = ("none", "vllm")
# Our field -> name in the file, lower and upper bound: those of a request's fields (cluster/api/schemas/base.py).
_FIELDS: Mapping[str, tuple[str, float, float]] = {
    "temperature": ("temperature", 0.0, 2.0),
    "top_p": ("top_p", 0.0, 1.0),
    "top_k": ("top_k", -1, 2**31 - 1),
    "min_p": ("min_p", 0.0, 1.0),
    "repetition_penalty": ("repetition_penalty", 0.01, 100.0),
    "max_tokens": ("max_new_tokens", 1, 2**31 - 1),
}
_COUNTS = ("top_k", "max_tokens")
# The keys of a GGUF file's metadata, which llama.cpp's converter takes from the same file.
_GGUF = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """None: the file says nothing. max_tokens: of a chat; a completion without a word about it ends after 16 tokens at the latest."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        """For a reader, such as "temperature 0.6, top_p 0.9"; "" if nothing is set."""
        set_here = [(f.name, value) for f in fields(self) if (value := getattr(self, f.name)) is not None]
        return ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in set_here
        )


NO_DEFAULTS = SamplingDefaults()


def generation_config(requested: str) -> str:
    """The option's value: "auto", "none", or a folder's absolute path. Raises ConfigError for a folder without the file."""
    if requested == "auto" or requested in _NONE:
        return "none" if requested in _NONE else requested
    folder = Path(requested).expanduser().absolute()
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"{OPTION} {requested} is neither auto, none nor a folder with {FILE}.",
            remedy=f"Give the folder of a {FILE}, or leave the option out.",
            param=OPTION,
        )
    return str(folder)


def read_sampling_defaults(model: Path, option: str) -> SamplingDefaults:
    """model: the checkpoint. option: see `generation_config`. Raises ConfigError for a file or a value that cannot be used."""
    if option == "none":
        return NO_DEFAULTS
    folder = model if option == "auto" else Path(option)
    found = (read_object(folder, FILE) if folder.is_dir() else None) or {}
    where = folder / FILE
    if not found and option == "auto" and (gguf := find_gguf(model)) is not None:
        found, where = _of_gguf(read_gguf(gguf).metadata), gguf
    values: dict[str, Any] = {
        name: _number(found[key], where, key, low=low, high=high, is_count=name in _COUNTS)
        for name, (key, low, high) in _FIELDS.items()
        if found.get(key) is not None
    }
    return SamplingDefaults(**values)


def _of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """In single precision there: 0.6 is 0.60000002."""
    found = {name: metadata[key] for key, name in _GGUF.items() if key in metadata}
    return {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in found.items()}


def _number(value: Any, path: Path, key: str, *, low: float, high: float, is_count: bool) -> float | int:
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        if not is_count:
            return float(value)
        if value == int(value):
            return int(value)
    raise ConfigError(
        f"{path} has {key} {shown(value)}, which is not a {'whole number' if is_count else 'number'} from {low:g} to {high:g}.",
        remedy=f"Correct it, or start with {OPTION} none.",
        param=OPTION,
    )
