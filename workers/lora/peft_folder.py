"""A PEFT folder: adapter_config.json and adapter_model.safetensors. Finds the pairs A and B and checks that they fit the model.

Loads no tensors and imports no torch. Knows names and shapes; nothing of ranks of a replica, slots and devices.

The tensor base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight, [rank, inputs], is the A of q_proj in layer 3.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from workers.checkpoint.regular_file import find_regular_file, shown
from workers.config import MAX_LORA_RANK
from workers.errors import CheckpointError, ConfigError
from workers.lora.peft_config import ATTENTION_MODULES, MLP_MODULES, MODULES, LoraSettings, read_settings
from workers.model_numbers import ModelConfig
from workers.thread_priority import no_break

WEIGHTS_FILE = "adapter_model.safetensors"
DIGEST_HEX_DIGITS = 12
FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PIECE_BYTES = 1 << 18
_NAME = re.compile(
    r"(?:base_model\.)?(?:model\.)*(?:language_model\.)?(?:model\.)*layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.[\w-]+)?\.weight"
)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """rank: the largest of all modules. modules: sorted names, such as q_proj. num_bytes: of all tensors, as stored. base_model: what the
    adapter says it was trained on. digest: 12 hex digits that change with the content.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    num_bytes: int
    base_model: str | None
    digest: str


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's tensors by their names in the file: `a` [rank, inputs], `b` [outputs, rank]. It adds scale * b @ a to the weight."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """pairs: by (layer, module)."""

    weights: Path
    settings: LoraSettings
    pairs: Mapping[tuple[int, str], LoraPair]
    num_bytes: int


def read_adapter(
    folder: str | Path, model: ModelConfig, *, max_rank: int, take_break: Callable[[], None] = no_break
) -> AdapterInfo:
    """Raises CheckpointError for an adapter that does not fit the model or asks for what is not supported.

    take_break: called after each piece of work.
    """
    files = open_adapter(Path(folder), model, max_rank=max_rank, take_break=take_break)
    return AdapterInfo(
        rank=max(pair.rank for pair in files.pairs.values()),
        alpha=files.settings.alpha,
        modules=tuple(sorted({module for _, module in files.pairs})),
        num_bytes=files.num_bytes,
        base_model=files.settings.base_model,
        digest=content_digest(files, take_break),
    )


def content_digest(files: AdapterFiles, take_break: Callable[[], None] = no_break) -> str:
    """Of the configuration, however it is formatted, and of every byte of the weights."""
    digest = hashlib.blake2b(json.dumps(files.settings.fields, sort_keys=True, separators=(",", ":")).encode())
    try:
        with files.weights.open("rb") as f:
            while piece := f.read(_PIECE_BYTES):
                digest.update(piece)
                take_break()
    except OSError as e:
        raise _unreadable(files.weights, e) from e
    return digest.hexdigest()[:DIGEST_HEX_DIGITS]


def open_adapter(
    folder: Path, model: ModelConfig, *, max_rank: int, take_break: Callable[[], None] = no_break
) -> AdapterFiles:
    """Which tensors the adapter has. As `read_adapter`."""
    settings = read_settings(folder)
    weights = _weights_file(folder)
    shapes = dict(_read_shapes(weights, take_break))
    pairs = _pairs(weights, shapes, settings, model, take_break)
    for (layer, module), pair in pairs.items():
        if pair.rank > max_rank:
            raise CheckpointError(
                f"{weights} has rank {pair.rank} in {module} of layer {layer}, more than the {max_rank} of --max-lora-rank.",
                remedy=f"Raise --max-lora-rank to {pair.rank}."
                if pair.rank <= MAX_LORA_RANK
                else f"Train it with at most rank {MAX_LORA_RANK}.",
            )
    return AdapterFiles(
        weights=weights,
        settings=settings,
        pairs=pairs,
        num_bytes=sum(num_bytes for _, num_bytes in shapes.values()),
    )


def module_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each module of a decoder layer."""
    hidden, q = model.hidden_size, model.num_attention_heads * model.head_dim
    kv, intermediate = model.num_key_value_heads * model.head_dim, model.intermediate_size
    shapes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
    mlp = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return dict(zip(MODULES, (*shapes, *mlp), strict=True))


def _weights_file(folder: Path) -> Path:
    try:
        path = find_regular_file(folder, WEIGHTS_FILE)
        pickled = None if path is not None else find_regular_file(folder, "adapter_model.bin")
    except ConfigError as e:
        raise CheckpointError(e.message, remedy=e.remedy) from e
    if pickled is not None:
        raise CheckpointError(
            f"{pickled} is a pickle file, which can run code when it is opened.",
            remedy=f"Save the adapter as {WEIGHTS_FILE}: save_pretrained(folder, safe_serialization=True).",
        )
    if path is None:
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_FILE}.", remedy="Name the folder that PEFT's save_pretrained wrote."
        )
    return path


def _read_shapes(weights: Path, take_break: Callable[[], None]) -> Iterator[tuple[str, tuple[tuple[int, ...], int]]]:
    """Each tensor's name, shape and bytes. Checks that they are floats."""
    try:
        with safe_open(weights, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (it has no __iter__)
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if dtype not in FLOATS:
                    raise CheckpointError(
                        f"{shown(name)} in {weights} has the type {dtype}, not a float.",
                        remedy="Save the adapter again.",
                    )
                num_bytes = _DTYPE_BYTES[dtype]
                for size in shape:
                    num_bytes *= size
                yield name, (shape, num_bytes)
                take_break()
    except SafetensorError as e:
        raise CheckpointError(
            f"{weights} is not a valid safetensors file: {e}.", remedy="Download or save it again."
        ) from e
    except OSError as e:
        raise _unreadable(weights, e) from e


def _unreadable(weights: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{weights} cannot be read: {error.strerror or error}.",
        remedy="Give read permission to the user that runs Ray.",
    )


def _pairs(
    weights: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], int]],
    settings: LoraSettings,
    model: ModelConfig,
    take_break: Callable[[], None],
) -> dict[tuple[int, str], LoraPair]:
    halves: dict[tuple[int, str], dict[str, str]] = {}
    for name in shapes:
        take_break()
        layer, module, half = _parse(weights, name, model)
        found = halves.setdefault((layer, module), {})
        if half in found:
            raise CheckpointError(
                f"{weights} has two tensors {half} for {module} of layer {layer}: {shown(found[half])} and {shown(name)}.",
                remedy="Save one adapter alone.",
            )
        found[half] = name
    if not halves:
        raise CheckpointError(f"{weights} has no tensors.", remedy="Save the adapter again.")
    pairs = {}
    for key, found in sorted(halves.items()):
        take_break()
        pairs[key] = _pair(weights, key, found, shapes, settings, model)
    return pairs


def _parse(weights: Path, name: str, model: ModelConfig) -> tuple[int, str, str]:
    """The layer, the module and "A" or "B"."""
    if "lora_magnitude" in name:
        raise CheckpointError(
            f"{weights} has {shown(name)}, so it is DoRA, which is not supported.",
            remedy="Train it with use_dora false.",
        )
    if "lora_embedding_" in name or ".embed_tokens." in name or "lm_head." in name:
        raise CheckpointError(
            f"{weights} has {shown(name)}: an adapter of the embedding or the output head, which is not supported.",
            remedy=f"Train it on some of {', '.join(MODULES)}.",
        )
    match = _NAME.fullmatch(name)
    module = "" if match is None else match[3]
    if match is None or module not in (ATTENTION_MODULES if match[2] == "self_attn" else MLP_MODULES):
        raise CheckpointError(
            f"{weights} has {shown(name)}, which is not a LoRA tensor of a linear layer that this model has.",
            remedy=f"Train it on some of {', '.join(MODULES)}.",
        )
    layer = int(match[1])
    if layer >= model.num_hidden_layers:
        raise CheckpointError(
            f"{weights} has {shown(name)}, but the model has the layers 0 to {model.num_hidden_layers - 1}.",
            remedy="Serve the base model that the adapter was trained on.",
        )
    return layer, module, match[4]


def _pair(
    weights: Path,
    key: tuple[int, str],
    found: Mapping[str, str],
    shapes: Mapping[str, tuple[tuple[int, ...], int]],
    settings: LoraSettings,
    model: ModelConfig,
) -> LoraPair:
    layer, module = key
    for half in "AB":
        if half not in found:
            other = found["B" if half == "A" else "A"]
            raise CheckpointError(
                f"{weights} has {shown(other)}, but not the {half} that belongs to it.",
                remedy="Save the adapter again.",
            )
    name = f"model.layers.{layer}.{'self_attn' if module in ATTENTION_MODULES else 'mlp'}.{module}"
    rank = settings.rank_of(name)
    outputs, inputs = module_shapes(model)[module]
    for half, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
        shape = shapes[found[half]][0]
        if shape != expected:
            raise CheckpointError(
                f"{shown(found[half])} in {weights} has shape {list(shape)}, but this model and rank {rank} ask for {list(expected)}.",
                remedy="Serve the base model that the adapter was trained on.",
            )
    return LoraPair(found["A"], found["B"], rank, settings.scale_of(name))
