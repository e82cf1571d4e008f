"""Which files of a checkpoint folder hold its weights, in either layout. Knows names and the index; opens no weights, and no torch."""

from pathlib import Path, PurePosixPath

from workers.checkpoint.regular_file import find_regular_file, read_object, shown
from workers.errors import CheckpointError, ConfigError
from workers.model_numbers import Layout

PATTERNS: dict[Layout, str] = {"huggingface": "model*.safetensors", "mistral": "consolidated*.safetensors"}
INDEXES: dict[Layout, str] = {
    "huggingface": "model.safetensors.index.json",
    "mistral": "consolidated.safetensors.index.json",
}
UNSAFE = ("*.bin", "*.pth", "*.pt")


def weight_files(folder: Path, layout: Layout) -> list[Path]:
    """The files that the index names or, without an index, all that are there. Raises CheckpointError if one, or all, are missing, and
    for what is not a regular file inside the folder.
    """
    weight_map = read_index(folder, layout)
    if weight_map is not None:
        return [_weight_file(folder, name, listed_in=INDEXES[layout]) for name in sorted(set(weight_map.values()))]
    paths = sorted(folder.glob(PATTERNS[layout])) or (_other_names(folder) if layout == "huggingface" else [])
    if paths:
        return [_weight_file(folder, path.name) for path in paths]
    for pattern in UNSAFE:
        for path in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{path} is a pickle file, which Tramontane does not load.", remedy="Convert it to safetensors."
            )
    raise CheckpointError(
        f"{folder} has no {PATTERNS[layout]}.",
        remedy="Put the weights into the same folder as the configuration file.",
    )


def _other_names(folder: Path) -> list[Path]:
    """AutoGPTQ's first versions wrote one file of a name of its own, gptq_model-4bit-128g.safetensors."""
    return sorted(folder.glob("gptq_model*.safetensors"))


def read_index(folder: Path, layout: Layout) -> dict[str, str] | None:
    """{tensor: file} of the index; None without an index. Raises CheckpointError."""
    name = INDEXES[layout]
    try:
        index = read_object(folder, name)
    except ConfigError as e:
        raise CheckpointError(e.message, remedy=e.remedy) from e
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{folder / name} is not a safetensors index with a weight_map.", remedy="Download it again."
        )
    for file in sorted(set(weight_map.values())):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\0" in file or path.suffix != ".safetensors":
            raise CheckpointError(
                f"{folder / name} names {shown(file)}, which is not a safetensors file in the folder.",
                remedy="Download it again from a source that you trust.",
            )
    return weight_map


def _weight_file(folder: Path, name: str, *, listed_in: str | None = None) -> Path:
    try:
        path = find_regular_file(folder, name)
    except ConfigError as e:
        raise CheckpointError(e.message, remedy=e.remedy) from e
    if path is None:
        raise CheckpointError(
            f"{folder / str(listed_in)} names {name}, which does not exist.", remedy="Download it too."
        )
    return path
