"""What MODEL on the command line means: a folder, a Hugging Face Hub id, or nothing for the demo model.

Knows where checkpoints lie; does not look into them. The Hub's own cache and HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.errors import ConfigError

HUB_TIMEOUT_S = 10.0
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
    folder = _here(model)
    if folder is not None:
        return folder, folder.name
    assert model is not None, "the demo model is here"
    return _from_hub(model, revision), model


def find_model(model: str | None, *, revision: str | None = None) -> Path | None:
    """As resolve_model, but downloads nothing: None for a Hub id that this machine's cache has nothing of. Raises ConfigError."""
    folder = _here(model)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as e:
        raise ConfigError(f"{model} is neither a folder here nor a possible Hub id: {e}") from e


def resolve_config(model: str, *, revision: str | None = None) -> Path:
    """A folder with the model's configuration: all that is downloaded of a Hub id. Raises ConfigError as resolve_model does."""
    from huggingface_hub import snapshot_download

    folder = _here(model)
    if folder is not None:
        return folder
    with _hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=["config.json", "params.json"]))


def download_bytes(model: str, *, revision: str | None = None) -> int:
    """How much resolve_model would download of a Hub id. Asks the Hub; raises ConfigError as resolve_model does."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with _hub_errors(model, revision):
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    ignored = ["consolidated*"] if "config.json" in sizes else None
    return sum(sizes[name] for name in filter_repo_objects(sizes, allow_patterns=_HUB_FILES, ignore_patterns=ignored))


def _here(model: str | None) -> Path | None:
    """The folder, if MODEL means one on this machine; None for a Hub id. Raises ConfigError."""
    if model is None:
        return _demo_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"The model folder {model} does not exist; name a folder or a Hub id such as owner/name.")
    return None


def _demo_model() -> Path:
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "examples" / "demo_model", package / "demo_model"):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        "The demo model is not part of this installation; name a model, or make it with `make demo-model`."
    )


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def download(**patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, **patterns))

    with _hub_errors(model, revision):
        # Mistral's own repositories carry the weights in both layouts; one is enough.
        folder = download(ignore_patterns=["consolidated*"])
        return folder if (folder / "config.json").is_file() else download()


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turns what the Hub's client raises into ConfigError with what to do."""
    import httpx  # the Hub's own HTTP client, whose errors it lets through where it only asks
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
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
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as e:
        raise ConfigError(f"{model} is not a folder here, and the Hub could not be reached to download it.") from e
