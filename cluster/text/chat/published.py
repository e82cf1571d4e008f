"""Recognizes what Mistral publishes: the Jinja templates of its 7B models, and its tokenizers.

mistral-common's templates take their place, which Mistral calls the ground truth: the Jinja ones differ from them in white space and
refuse conversations that they allow. Any other template is the checkpoint's own and is used as it is.

The digests are of the sources as they stand in tokenizer_config.json, without line ends at the end. Sources: llama-cpp-python
(llama_chat_format.py) quotes the first two with the models' addresses, guidance (chat.py) the fourth with its address and date. The last
is quoted alike by several users of the model. The vocabulary of v1 is in mistral-common's package.
"""

import hashlib
import re
from functools import cache
from pathlib import Path

import mistral_common

from cluster.text.tokenizer import Tokenizer
from cluster.text.tokenizer_file import TemplateVersion
from workers.tokenizer_files.sentencepiece_model import SentencePieceModel

_V1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"

_PUBLISHED = {
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495": "Mistral-7B-Instruct-v0.1 of 2023",
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7": "Mistral-7B-Instruct-v0.2 of 2023",
    "046388a492ef370b38e94cd755a62ed17ee18afbefe01df64d48a9da985005e0": "Mixtral-8x7B-Instruct-v0.1 of 2024",
    "bbc58aad99454df60138be9530c9601a0adfe3d8932cda975e1f10b2410ddc51": "Mistral-7B-Instruct-v0.1 and v0.2 of 2024",
    "cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd": "Mistral-7B-Instruct-v0.3 of 2024",
}
# What a template writes, and the name of the format for a reader.
_FORMATS = (
    ("<|im_start|>", "ChatML"),
    ("<|start_header_id|>", "Llama 3's format"),
    ("<|assistant|>", "Zephyr's format"),
    ("[INST]", "[INST] around questions"),
)
_NUM_V1, _NUM_V3 = 32_000, 32_768
_OWN_NAME = re.compile(r"tokenizer\.model\.v\d.*|tekken.*\.json")


def own_version(tokenizer: Tokenizer) -> TemplateVersion | None:
    """The version of mistral-common's templates that belongs to the vocabulary; None unless it is one of Mistral's, with no token added.

    The pieces decide, whatever file they are in: tokenizer.model, tokenizer.json and GGUF files may have anybody's, and Llama 2's has
    32,000 too.
    """
    if _OWN_NAME.fullmatch(tokenizer.path.name):
        return tokenizer.template_version
    if tokenizer.vocab_size == _NUM_V1:
        return "v1" if tokenizer.pieces.names == _names_of_v1() else None
    is_v3 = tokenizer.vocab_size == _NUM_V3 and tokenizer.control_token_id("[INST]") is not None
    return "v3" if is_v3 else None


@cache
def _names_of_v1() -> tuple[str, ...]:
    return SentencePieceModel(_V1).pieces.names


def is_release(tokenizer: Tokenizer, source: str) -> bool:
    """Whether a checkpoint with this template has the files of a release of Mistral's.

    These name the version of mistral-common's template, and [INST] in the Jinja one says that it is an imitation of that, of which there
    are more than the digests here. A fine-tune in another format may keep the file, too.
    """
    return _OWN_NAME.fullmatch(tokenizer.path.name) is not None and "[INST]" in source


def format_name(source: str) -> str | None:
    """What a reader may know the template's format as."""
    return next((name for written, name in _FORMATS if written in source), None)


def published_name(source: str) -> str | None:
    """Which of Mistral's models has exactly this template; None for any other template."""
    return _PUBLISHED.get(hashlib.sha256(source.rstrip("\n").encode("utf-8", "surrogatepass")).hexdigest())
