"""Recognizes what Mistral publishes: the Jinja templates of its 7B models, and its tokenizers.

mistral-common's templates take their place, which Mistral calls the ground truth: the Jinja ones differ from them in white space and
refuse conversations that they allow. Any other template is the checkpoint's own and is used as it is.

The digests are of the sources as they stand in tokenizer_config.json, without line ends at the end. Sources: llama-cpp-python
(llama_chat_format.py) quotes the first two with the models' addresses, guidance (chat.py) the fourth with its address and date. The last
is quoted alike by several users of the model. The vocabulary's digest is that of the file in mistral-common's package.
"""

import hashlib
import re
from pathlib import Path
from typing import Protocol

_PUBLISHED = {
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495": "Mistral-7B-Instruct-v0.1 of 2023",
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7": "Mistral-7B-Instruct-v0.2 of 2023",
    "046388a492ef370b38e94cd755a62ed17ee18afbefe01df64d48a9da985005e0": "Mixtral-8x7B-Instruct-v0.1 of 2024",
    "bbc58aad99454df60138be9530c9601a0adfe3d8932cda975e1f10b2410ddc51": "Mistral-7B-Instruct-v0.1 and v0.2 of 2024",
    "cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd": "Mistral-7B-Instruct-v0.3 of 2024",
}
_VOCABULARY_V1 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
_NUM_V1, _NUM_V3 = 32_000, 32_768
_OWN_NAME = re.compile(r"tokenizer\.model\.v\d.*|tekken.*\.json")


class OpenTokenizer(Protocol):
    """What of a tokenizer tells whose it is."""

    @property
    def path(self) -> Path: ...

    @property
    def vocab_size(self) -> int: ...

    def control_token_id(self, name: str) -> int | None: ...


def is_mistrals_release(tokenizer: OpenTokenizer, source: str) -> bool:
    """Whether a checkpoint with this template has the files of a release of Mistral's.

    These name the version of mistral-common's template, and [INST] in the Jinja one says that it is an imitation of that, of which there
    are more than the digests here. A fine-tune in another format may keep the file, too.
    """
    return _OWN_NAME.fullmatch(tokenizer.path.name) is not None and "[INST]" in source


def is_mistrals(tokenizer: OpenTokenizer) -> bool:
    """Whether a checkpoint has one of Mistral's own vocabularies and adds no token to it.

    A plain tokenizer.model may be anybody's: Llama 2's has 32,000 pieces too.
    """
    if _OWN_NAME.fullmatch(tokenizer.path.name):
        return True
    if tokenizer.path.name != "tokenizer.model":
        return False
    if tokenizer.vocab_size == _NUM_V1:
        return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest() == _VOCABULARY_V1
    return tokenizer.vocab_size == _NUM_V3 and tokenizer.control_token_id("[INST]") is not None


def published_name(source: str) -> str | None:
    """Which of Mistral's models has exactly this template; None for any other template."""
    return _PUBLISHED.get(hashlib.sha256(source.rstrip("\n").encode("utf-8", "surrogatepass")).hexdigest())
