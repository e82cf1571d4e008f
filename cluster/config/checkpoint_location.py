"""What MODEL on the command line means: a folder, a Hugging Face Hub id, the address of a bucket, or nothing for the demo model.

Knows where checkpoints are; does not read them. The Hub's own cache and HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cluster.config.bucket_model import cache_folder, download, is_bucket
from cluster.config.checkpoint_kinds import check_names, not_a_folder
from cluster.config.gguf_location import all_parts_in, check_name, choose_gguf, gguf_patterns, local_gguf
from workers.checkpoint.gguf.gguf_file import find_gguf, first_part, model_name
from workers.errors import ConfigError

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PATTERN = "model*.safetensors"  # Hugging Face's layout
# Data only: no `.pth` weights, since unpickling them runs code, and no Python files.
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "params.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "adapter_config.json",
    "tokenizer.model*",
    "tokenizer.json",
    "tokenizer_config.json",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
]
# Weights in a repository's folders are of other formats, or of earlier steps of the training.
_NOT_OF_HUB = ["*/*.safetensors", "*/*.safetensors.index.json"]


def resolve_model(model: str | None, *, revision: str | None = None, gguf_file: str | None = None) -> tuple[Path, str]:
    """The checkpoint's folder, or its GGUF file (the first part), and the name to serve it under. May download. Raises ConfigError.

    gguf_file: the one in the folder or repository; None where there is only one, and for other checkpoints.
    """
    if model is not None and is_bucket(model):
        folder = download(model, [*_HUB_FILES, "*.gguf"])
        return local_gguf(folder, gguf_file) or folder, model.rstrip("/").rpartition("/")[2]
    location = _local(model, gguf_file)
    if location is not None:
        # A folder with one GGUF file is served under its own name.
        is_whole_folder = gguf_file is None and model is not None and Path(model).expanduser().is_dir()
        return location, model_name(Path(str(model)).expanduser().resolve() if is_whole_folder else location)
    assert model is not None, "the demo model is a local folder"
    return _from_hub(model, revision, gguf_file), model


def find_model(model: str | None, *, revision: str | None = None, gguf_file: str | None = None) -> Path | None:
    """As resolve_model, but downloads nothing: None for a Hub id that is not in this machine's cache. Raises ConfigError."""
    if model is not None and is_bucket(model):
        folder = cache_folder(model)
        return (local_gguf(folder, gguf_file) or folder) if folder.is_dir() else None
    location = _local(model, gguf_file)
    if location is not None:
        return location
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as e:
        raise _not_a_hub_id(model, e) from e
    if gguf_file is None:
        return find_gguf(folder) or folder
    return first_part(folder / gguf_file) if all_parts_in(folder, gguf_file) else None


def resolve_config(model: str, *, revision: str | None = None, gguf_file: str | None = None) -> Path:
    """A folder with the model's configuration file, all that it downloads of a Hub id. Raises ConfigError as resolve_model does.

    The configuration of a GGUF file is in the file itself, which is not downloaded for it.
    """
    from huggingface_hub import snapshot_download

    if gguf_file is not None:
        found = find_model(model, revision=revision, gguf_file=gguf_file)
        if found is not None:
            return found
        raise ConfigError(
            f"{gguf_file} of {model} is not on this machine, and its configuration is in the file itself.",
            remedy=f"Download it with `hf download {model} {' '.join(gguf_patterns(gguf_file))}` first.",
            param="--gguf-file",
        )
    location = _local(model, gguf_file)
    if location is not None:
        return location
    with hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=["config.json", "params.json"]))


def download_bytes(model: str, *, revision: str | None = None, gguf_file: str | None = None) -> int:
    """Bytes that resolve_model would download of a Hub id. Asks the Hub; raises ConfigError as resolve_model does."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with hub_errors(model, revision):
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if (file := choose_gguf(sizes, gguf_file, where=model)) is not None:
        return sum(sizes[name] for name in filter_repo_objects(sizes, allow_patterns=gguf_patterns(file)))
    both = "config.json" in sizes and any(fnmatch(name, PATTERN) for name in sizes)
    return sum(sizes[name] for name in filter_repo_objects(sizes, **hub_patterns(consolidated=not both)))


def hub_patterns(*, consolidated: bool) -> dict[str, list[str]]:
    """Which files of a repository are downloaded, as arguments for the Hub's client.

    consolidated: also weights in Mistral's layout. Its own repositories have them in both layouts, and one is enough.
    """
    ignored = _NOT_OF_HUB if consolidated else [*_NOT_OF_HUB, "consolidated*"]
    return {"allow_patterns": _HUB_FILES, "ignore_patterns": ignored}


def _local(model: str | None, gguf_file: str | None) -> Path | None:
    """The folder or GGUF file, if MODEL means one on this machine; None for a Hub id. Raises ConfigError."""
    if model is None:
        if gguf_file is not None:
            raise ConfigError(
                "--gguf-file has no effect on the demo model.", remedy="Give a model too.", param="--gguf-file"
            )
        return _demo_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return local_gguf(folder, gguf_file) or folder
    if folder.exists():
        file = local_gguf(folder.parent.resolve() / folder.name, gguf_file)
        if file is None:
            raise not_a_folder(folder)
        return file
    if folder.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"The model folder {model} does not exist.",
            remedy="Give an existing folder, or a Hub id such as owner/name.",
            param="MODEL",
        )
    return None


def _demo_model() -> Path:
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "examples" / "demo_model", package / "demo_model"):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        "The demo model is not part of this installation.",
        remedy="Give a model, or make the demo model with `make demo-model`.",
        param="MODEL",
    )


def _from_hub(model: str, revision: str | None, gguf_file: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    def download_gguf(file: str) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=gguf_patterns(file))) / file

    def download(*, consolidated: bool) -> Path:
        return Path(snapshot_download(model, revision=revision, **hub_patterns(consolidated=consolidated)))

    with hub_errors(model, revision):
        if gguf_file is not None:
            check_name(gguf_file)
            # A complete one in the cache is used without asking the Hub for its list.
            file = download_gguf(first_part(Path(gguf_file)).as_posix())
            if not file.exists():
                choose_gguf(HfApi().list_repo_files(model, revision=revision), gguf_file, where=model)
            return file
        folder = download(consolidated=False)
        if (folder / "config.json").is_file() and any(folder.glob(PATTERN)):
            return folder
        folder = download(consolidated=True)
        if not any(folder.glob("*.safetensors")):
            # Nothing of it may have been downloaded, so the repository itself says what it is instead.
            names = HfApi().list_repo_files(model, revision=revision)
            if (chosen := choose_gguf(names, None, where=model)) is not None:
                return download_gguf(chosen)
            check_names(names, where=model)
        return folder


@contextmanager
def hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turns the exceptions of the Hub's client into ConfigError."""
    # Late, like the Hub's client: most commands need neither.
    import httpx
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
        raise ConfigError(
            f"{model} is gated on the Hub.",
            remedy="Accept its terms on its Hub page and set HF_TOKEN to your token.",
            param="MODEL",
        ) from e
    except RevisionNotFoundError as e:
        raise ConfigError(
            f"{model} has no revision {revision!r}.",
            remedy="Give one of its branches, tags or commits.",
            param="--revision",
        ) from e
    except HFValidationError as e:
        raise _not_a_hub_id(model, e) from e
    except RepositoryNotFoundError as e:
        raise ConfigError(
            f"There is no folder {model}, and no Hub model of this id that you may read.",
            remedy="Check the id; for a private model set HF_TOKEN.",
            param="MODEL",
        ) from e
    # The Hub's client lets errors of httpx through in some calls.
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as e:
        raise ConfigError(
            f"{model} is not a folder here, and the Hub could not be reached to download it.",
            remedy="Check the network, or give a folder.",
            param="MODEL",
        ) from e


def _not_a_hub_id(model: str | None, reason: Exception) -> ConfigError:
    return ConfigError(
        f"{model} is neither a folder here nor a valid Hub id: {reason}",
        remedy="Give an existing folder, or a Hub id such as owner/name.",
        param="MODEL",
    )
