"""Whether a folder is a checkpoint that can be served, before anything starts: its configuration, weights, tokenizer and chat template.

Reads configuration files and the headers of weight files, so a 7B model takes a moment. Opens regular files inside the folder only. Whether
weights are finite numbers is found when they are loaded (workers/weights/loader.py).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config.checkpoint_kinds import check_kind
from workers.checkpoint.gguf.gguf_config import read_parts
from workers.checkpoint.gguf.gguf_file import find_gguf, gguf_files
from workers.checkpoint.model_config import load_model_config
from workers.checkpoint.regular_file import check_small_file
from workers.config import ModelConfig
from workers.errors import CheckpointError, ConfigError

REMEDY = "Use a complete checkpoint that Tramontane supports."
# What is read of a folder besides its weights and their index.
SMALL_FILES = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
)
_Fault = ConfigError | CheckpointError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the folder has. fingerprint: changes with the configuration, the sizes and the headers; None if these cannot be read.

    left_out: in words, the tensors that the language model does not need; None if it needs all.
    """

    config: ModelConfig | None = None
    num_files: int = 0
    num_bytes: int = 0
    fingerprint: str | None = None
    left_out: str | None = None
    faults: tuple[_Fault, ...] = ()


def check_checkpoint(folder: Path, *, chat_template: str | None = "auto") -> None:
    """Raises ConfigError or CheckpointError with the first fault.

    chat_template: the option, None where no chat is served. The template that it means must be able to write a plain question.
    """
    faults = examine_checkpoint(folder, chat_template=chat_template).faults
    if faults:
        raise faults[0]


def examine_checkpoint(folder: Path, *, chat_template: str | None = "auto") -> Checkpoint:
    """Everything that is wrong with an existing folder, or GGUF file. Never raises for what is in it."""
    try:
        check_kind(folder)
        for name in SMALL_FILES if folder.is_dir() else ():
            check_small_file(folder, name)
        config = load_model_config(folder)
    except (ConfigError, CheckpointError) as e:
        return Checkpoint(faults=(e,))
    except OSError as e:
        error = ConfigError(f"{folder} cannot be read: {e.strerror}.", remedy="Check its permissions.", param="MODEL")
        return Checkpoint(faults=(error,))
    weights = _examine_weights(folder, config)
    found = _fault_of(lambda: _check_text(folder, config, chat_template))
    return Checkpoint(
        config=config,
        num_files=weights.num_files,
        num_bytes=weights.num_bytes,
        fingerprint=weights.fingerprint,
        left_out=weights.left_out,
        faults=weights.faults if found is None else (*weights.faults, found),
    )


def _examine_weights(folder: Path, config: ModelConfig) -> Checkpoint:
    # Late: importing the command line imports no module of weights.
    from workers.weights.completeness import check_index, check_tensors
    from workers.weights.files import weight_files
    from workers.weights.header import TensorInfo, read_header
    from workers.weights.left_out import describe_left_out

    if config.layout == "gguf":
        return _examine_gguf(folder, config)
    try:
        files = weight_files(folder, config.layout)
    except CheckpointError as e:
        return Checkpoint(faults=(e,))
    digest = hashlib.sha256()
    for name in ("config.json", "params.json"):
        digest.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    tensors: dict[str, TensorInfo] = {}
    faults: list[_Fault] = []
    for file in files:
        try:
            header, found = read_header(file)
            if repeated := next((name for name in found if name in tensors), None):
                raise CheckpointError(
                    f"Tensor {repeated!r} is in both {tensors[repeated].path} and {file.name}.",
                    remedy="Remove one of the files.",
                )
        except CheckpointError as e:
            faults.append(e)
            continue
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
        tensors |= found
    if not faults:
        checks = (lambda: check_index(folder, config.layout, tensors), lambda: check_tensors(folder, config, tensors))
        faults += [fault for check in checks if (fault := _fault_of(check)) is not None][:1]
    return Checkpoint(
        num_files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        fingerprint=digest.hexdigest()[:16],
        left_out=describe_left_out(tensors),
        faults=tuple(faults),
    )


def _examine_gguf(location: Path, config: ModelConfig) -> Checkpoint:
    from workers.weights.completeness import check_tensors
    from workers.weights.left_out import describe_left_out

    file = find_gguf(location)
    assert file is not None, "its configuration was read from it"
    files = gguf_files(file)
    header = read_parts(file)
    digest = hashlib.sha256()
    for part in files:
        with part.open("rb") as f:
            digest.update(f"{part.name} {part.stat().st_size}".encode() + f.read(header.header_bytes))
    fault = _fault_of(lambda: check_tensors(file, config, header.tensors))
    return Checkpoint(
        num_files=len(files),
        num_bytes=sum(part.stat().st_size for part in files),
        fingerprint=digest.hexdigest()[:16],
        left_out=describe_left_out(header.tensors),
        faults=() if fault is None else (fault,),
    )


def _check_text(folder: Path, config: ModelConfig, chat_template: str | None) -> None:
    """The tokenizer and the chat template can be used, which is tried."""
    from cluster.text.load import load_text  # late: only this check needs SentencePiece and Jinja
    from cluster.text.tokenizer import load_tokenizer

    extra = folder / "additional_chat_templates"
    for path in sorted(extra.glob("*.jinja")):
        check_small_file(folder, f"{extra.name}/{path.name}")
    if chat_template is None:
        load_tokenizer(folder, model_vocab_size=config.vocab_size)
    else:
        load_text(folder, chat_template=chat_template, model_vocab_size=config.vocab_size)


def _fault_of(check: Callable[[], None]) -> _Fault | None:
    try:
        check()
    except (ConfigError, CheckpointError) as e:
        return e
    return None
