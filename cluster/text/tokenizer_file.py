"""Which of a checkpoint's files is its tokenizer, and which chat template belongs to it. Knows names and, where two agree, vocabularies.

    of these, the first that the checkpoint has    template
    a GGUF file's own metadata                     none
    tekken.json                                    the version that it names, such as v3
    tokenizer.model.v7, .v3, .v2, .v1              v7, v3, v2, v1, by the suffix
    tokenizer.json                                 none
    tokenizer.model                                v3 with 32,768 pieces (Mistral v0.3), otherwise v1 (v0.1 and v0.2 have 32,000)

Mistral's own files come before tokenizer.json, as in vLLM, and that before tokenizer.model, as in transformers. The one exception is only
about the reader: where tokenizer.json lists the very pieces of tokenizer.model, SentencePiece reads them, which gives the same ids and fits
Mistral's templates; what tokenizer.json says about added tokens and spaces still counts (tokenizer_settings.py).
"""

import json
import re
from pathlib import Path
from typing import Literal, get_args

from workers.checkpoint.gguf.gguf_file import find_gguf
from workers.errors import ConfigError

TemplateVersion = Literal["v1", "v2", "v3", "v7", "v11", "v13", "v15"]
TEMPLATE_VERSIONS: tuple[TemplateVersion, ...] = get_args(TemplateVersion)
_V3_VOCAB_SIZE = 32_768
_VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)(m\d+)?")


def find_tokenizer(location: Path) -> Path:
    """The file. location: a folder, or a GGUF file. Raises ConfigError if there is none that is supported."""
    gguf = find_gguf(location)
    if gguf is not None:
        return gguf
    tekken = sorted(location.glob("tekken*.json"), key=lambda path: (path.name == "tekken.json", path.name))
    if tekken:
        return tekken[-1]
    versioned = {
        int(m[1]): p for p in sorted(location.glob("tokenizer.model.v*")) if (m := _VERSIONED.fullmatch(p.name))
    }
    if versioned:
        return versioned[max(versioned)]
    model, fast = location / "tokenizer.model", location / "tokenizer.json"
    if fast.is_file():
        return model if model.is_file() and _have_same_pieces(model, fast) else fast
    if model.is_file():
        return model
    if (location / "vocab.json").is_file() and (location / "merges.txt").is_file():
        raise ConfigError(
            f"{location} has its tokenizer in vocab.json and merges.txt, which are not supported.",
            remedy="Save it as tokenizer.json with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
        )
    raise ConfigError(
        f"{location} has no tokenizer.", remedy="Add tekken.json, tokenizer.json or tokenizer.model to the folder."
    )


def template_version(path: Path, *, vocab_size: int, tekken_version: str | None = None) -> TemplateVersion | None:
    """Of mistral-common, for that file; None if the file is in a format that mistral-common does not read."""
    named = _VERSIONED.fullmatch(path.name)
    name = tekken_version or (None if named is None else f"v{named[1]}")
    if name is not None:
        return next((v for v in TEMPLATE_VERSIONS if v == name), None)
    if path.suffix in (".json", ".gguf"):
        return None
    return "v3" if vocab_size == _V3_VOCAB_SIZE else "v1"


def _have_same_pieces(model: Path, fast: Path) -> bool:
    """Whether tokenizer.json is that SentencePiece model in another format. False if either cannot be read."""
    from workers.tokenizer_files.sentencepiece_model import SentencePieceModel

    try:
        vocab = json.loads(fast.read_text(encoding="utf-8"))["model"]["vocab"]
        pieces = SentencePieceModel(model).pieces.names
        return len(vocab) >= len(pieces) and all(vocab.get(name) == i for i, name in enumerate(pieces))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError):
        return False  # tokenizer.model of Llama 3 is in another format; the error of tokenizer.json comes when it is opened
