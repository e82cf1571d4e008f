"""What MODEL on the command line means: a folder, a Hugging Face Hub id, or nothing for the demo model.

Knows where checkpoints lie; does not look into them. The Hub's own cache and HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.
"""

import re
from pathlib import Path

from workers.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# `.pth` weights are left out on purpose: unpickling runs code.
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "params.json",
    "tokenizer*",
    "generation_config.json",
]


def resolve_model(model: str | None, *, revision: str | None = None) -> tuple[Path, str]:
    """The checkpoint's folder and the name to serve it under. May download. Raises ConfigError."""
    if model is None:
        folder = _demo_model()
        return folder, folder.name
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve(), folder.resolve().name
    if folder.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"The model folder {model} does not exist; name a folder or a Hub id such as owner/name.")
    return _from_hub(model, revision), model


def _demo_model() -> Path:
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "examples" / "demo_model", here / "demo_model"):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        "The demo model is not part of this installation; name a model, or make it with `make demo-model`."
    )


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(**patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, **patterns))

    try:
        # Mistral's own repositories carry the weights in both layouts; one is enough.
        folder = download(ignore_patterns=["consolidated*"])
        return folder if (folder / "config.json").is_file() else download()
    except GatedRepoError as e:
        raise ConfigError(f"{model} is gated: accept its terms on its Hub page and set HF_TOKEN to your token.") from e
    except RevisionNotFoundError as e:
        raise ConfigError(f"{model} has no revision {revision!r}; name a branch, tag or commit it has.") from e
    except HFValidationError as e:
        raise ConfigError(f"{model} is neither a folder here nor a possible Hub id: {e}") from e
    except RepositoryNotFoundError as e:
        raise ConfigError(
            f"There is no folder {model}, and no Hub model that you may see; for a private one set HF_TOKEN."
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ConfigError(f"{model} is not a folder here, and the Hub could not be reached to download it.") from e
