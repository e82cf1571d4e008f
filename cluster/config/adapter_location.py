"""What NAME=PATH_OR_HUB_ID means for an adapter: a folder on this machine, or a repository of the Hub. Does not read the adapter."""

import re
from pathlib import Path

from cluster.config.checkpoint_location import hub_errors
from workers.errors import ConfigError

# Data only, as of checkpoints.
_HUB_FILES = ["adapter_config.json", "adapter_model.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_adapter(source: str) -> Path:
    """The adapter's folder. Downloads what it needs of a Hub id. Raises ConfigError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ConfigError(
            f"The adapter {source} is a file.",
            remedy="Give the folder with adapter_config.json and adapter_model.safetensors.",
            param="--lora",
        )
    if folder.is_absolute() or source.startswith((".", "~")) or not _HUB_ID.fullmatch(source):
        raise ConfigError(
            f"The adapter folder {source} does not exist.",
            remedy="Give an existing folder, or a Hub id such as owner/name.",
            param="--lora",
        )
    from huggingface_hub import snapshot_download

    with hub_errors(source, None):
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))


def parse_lora(text: str) -> tuple[str, str]:
    """ "support=adapters/support" as (name, source). Raises ValueError with the reason."""
    name, equals, source = text.partition("=")
    if not equals or not name or not source:
        raise ValueError(f"{text!r} is not NAME=PATH_OR_HUB_ID, as in support=adapters/support")
    return name, source
