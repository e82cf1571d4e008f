"""Which files of a checkpoint folder hold its weights, in either layout. Knows names and the index; opens no weights, and no torch."""

import json
from pathlib import Path

from workers.config import Layout
from workers.errors import CheckpointError

PATTERNS = {"huggingface": "model*.safetensors", "mistral": "consolidated*.safetensors"}
INDEXES = {"huggingface": "model.safetensors.index.json", "mistral": "consolidated.safetensors.index.json"}
UNSAFE = ("*.bin", "*.pth", "*.pt")


def weight_files(folder: Path, layout: Layout) -> list[Path]:
    """The files that the index names or, without an index, all that are there. Raises CheckpointError if one, or all, are missing."""
    index = folder / INDEXES[layout]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise CheckpointError(
                f"{index} is not a safetensors index with a weight_map.", remedy="Download it again."
            ) from e
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{index} names {name}, which does not exist.", remedy="Download it too.")
        return [folder / name for name in names]
    paths = sorted(folder.glob(PATTERNS[layout]))
    if paths:
        return paths
    for pattern in UNSAFE:
        for path in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{path} is a pickle file, which Tramontane does not load.", remedy="Convert it to safetensors."
            )
    raise CheckpointError(
        f"{folder} has no {PATTERNS[layout]}.",
        remedy="Put the weights into the same folder as the configuration file.",
    )
