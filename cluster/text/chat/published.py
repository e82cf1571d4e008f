"""Recognizes the Jinja templates that Mistral publishes for its 7B models.

mistral-common's templates take their place, which Mistral calls the ground truth: the Jinja ones differ from them in white space and
refuse conversations that they allow. Any other template is the checkpoint's own and is used as it is.

The digests are of the sources as they stand in tokenizer_config.json, without line ends at the end. Sources: llama-cpp-python
(llama_chat_format.py) quotes the first two with the models' addresses, guidance (chat.py) the fourth with its address and date. The last
is quoted alike by several users of the model.
"""

import hashlib

_PUBLISHED = {
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495": "Mistral-7B-Instruct-v0.1 of 2023",
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7": "Mistral-7B-Instruct-v0.2 of 2023",
    "046388a492ef370b38e94cd755a62ed17ee18afbefe01df64d48a9da985005e0": "Mixtral-8x7B-Instruct-v0.1 of 2024",
    "bbc58aad99454df60138be9530c9601a0adfe3d8932cda975e1f10b2410ddc51": "Mistral-7B-Instruct-v0.1 and v0.2 of 2024",
    "cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd": "Mistral-7B-Instruct-v0.3 of 2024",
}


def published_name(source: str) -> str | None:
    """Which of Mistral's models has exactly this template; None for any other template."""
    return _PUBLISHED.get(hashlib.sha256(source.rstrip("\n").encode("utf-8", "surrogatepass")).hexdigest())
