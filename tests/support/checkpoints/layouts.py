"""Tiny checkpoints in the layouts of models that people run: the files of each, with Mistral's real vocabularies where these are small.

The weights are zero and the vocabularies of tekken and SmolLM2 small; all that says how text is read is as in the real checkpoint. The
templates are written from the formats' descriptions (ChatML, Zephyr, Mistral's own of 2023).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from support.checkpoints.checkpoint_files import CONFIG, WEIGHTS, headers_of, write_weights
from support.vocabularies.tekken import NUM_PIECES, NUM_SPECIAL, write_tekken
from support.vocabularies.tokenizers import trained

DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_ROLES = "Conversation roles must alternate user/assistant/user/assistant/..."
# Mistral's of 2023, of v0.1; v0.2's has no space after the end token.
INSTRUCT_V01 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    f"{{{{ raise_exception('{_ROLES}') }}}}{{% endif %}}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The gist of those that Mistral publishes for later models, of which there are many.
INSTRUCT_LATER = (
    INSTRUCT_V01.replace("'[INST] '", "'[INST]'").replace("' [/INST]'", "'[/INST]'").replace(" + ' ' }}", " }}")
)
INSTRUCT_V02 = INSTRUCT_V01.replace("eos_token + ' ' }}", "eos_token}}")
_TEKKEN_SIZE = NUM_SPECIAL + NUM_PIECES


@dataclass(frozen=True, kw_only=True)
class Layout:
    """vocabulary: "v1", "v3" (SentencePiece), "tekken v7", "smollm2", "llama3" or "transformers 5". file: of a SentencePiece vocabulary.

    added: special tokens after those of the vocabulary. config, tokenizer, generation: of config.json, tokenizer_config.json and
    generation_config.json; a name stands for its id in the last. template_file: where the template stands. fast: whether there is a
    tokenizer.json as well.
    """

    vocabulary: str
    vocab_size: int
    file: str = "tokenizer.model"
    added: tuple[str, ...] = ()
    template: str | None = None
    template_file: str = "tokenizer_config.json"
    fast: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


_IM = ("<|im_end|>", "<|im_start|>")
_IM_END = 32_000
_V02 = {"sliding_window": None, "rope_theta": 1e6}
LAYOUTS: dict[str, Layout] = {
    "Zephyr 7B beta": Layout(
        vocabulary="v1",
        vocab_size=32_000,
        template=ZEPHYR,
        config={"sliding_window": 4096, "eos_token_id": 2},
        tokenizer={"eos_token": "</s>", "pad_token": "</s>", "legacy": True},
    ),
    "OpenHermes 2.5": Layout(
        vocabulary="v1",
        vocab_size=32_002,
        added=_IM,
        template=CHATML,
        config={"sliding_window": 4096, "eos_token_id": _IM_END},
        tokenizer={"eos_token": "<|im_end|>", "legacy": True},
        generation={"bos_token_id": 1, "eos_token_id": _IM_END},
    ),
    # Its config.json has v0.1's end token: only the tokenizer says that <|im_end|> ends an answer.
    "Mistral OpenOrca": Layout(
        vocabulary="v1",
        vocab_size=32_002,
        added=_IM,
        template=CHATML,
        config={"sliding_window": 4096, "eos_token_id": 2},
        tokenizer={"eos_token": "<|im_end|>"},
    ),
    "Instruct v0.1": Layout(
        vocabulary="v1", vocab_size=32_000, template=INSTRUCT_V01, config={"sliding_window": 4096, "eos_token_id": 2}
    ),
    "Instruct v0.2": Layout(
        vocabulary="v1", vocab_size=32_000, template=INSTRUCT_V02, config={**_V02, "eos_token_id": 2}
    ),
    "Instruct v0.3": Layout(
        vocabulary="v3",
        vocab_size=32_768,
        file="tokenizer.model.v3",
        template=INSTRUCT_LATER,
        config={**_V02, "eos_token_id": 2},
    ),
    "Codestral 22B": Layout(
        vocabulary="v3", vocab_size=32_768, file="tokenizer.model.v3", fast=False, config={**_V02, "eos_token_id": 2}
    ),
    "Mathstral 7B": Layout(
        vocabulary="v3", vocab_size=32_768, file="tokenizer.model.v3", fast=False, config={**_V02, "eos_token_id": 2}
    ),
    "Mistral Nemo": Layout(
        vocabulary="tekken v3",
        vocab_size=_TEKKEN_SIZE,
        template=INSTRUCT_LATER,
        config={**_V02, "head_dim": 8, "eos_token_id": 2},
    ),
    "Ministral 8B": Layout(
        vocabulary="tekken v3", vocab_size=_TEKKEN_SIZE, config={"sliding_window": 32_768, "eos_token_id": 2}
    ),
    "Mistral Small 24B": Layout(
        vocabulary="tekken v7",
        vocab_size=_TEKKEN_SIZE,
        config={**_V02, "eos_token_id": 2},
        generation={"do_sample": True, "temperature": 0.15, "eos_token_id": 2},
    ),
    "SmolLM2 Instruct": Layout(
        vocabulary="smollm2",
        vocab_size=704,
        template=SMOLLM2,
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": 2, "bos_token_id": 1},
        tokenizer={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    ),
    "Llama 3 Instruct": Layout(
        vocabulary="llama3",
        vocab_size=704,
        template=LLAMA_3,
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 5e5, "eos_token_id": None},
        tokenizer={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        generation={"temperature": 0.6, "top_p": 0.9, "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]},
    ),
    "saved by transformers 5": Layout(
        vocabulary="transformers 5",
        vocab_size=32_002,
        added=_IM,
        template=CHATML,
        template_file="chat_template.jinja",
        config={"sliding_window": 4096, "eos_token_id": _IM_END},
        tokenizer={"eos_token": "<|im_end|>"},
    ),
}


def write_layout(folder: Path, name: str) -> Path:
    """A complete checkpoint. Returns the folder."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": layout.vocab_size} | layout.config))
    write_weights(folder / WEIGHTS, headers_of(folder))
    if layout.generation:
        ends = layout.generation["eos_token_id"]
        if isinstance(ends, list):
            ends = [Tokenizer.from_str(trained(layout.vocabulary)).token_to_id(name) for name in ends]
        (folder / "generation_config.json").write_text(json.dumps(layout.generation | {"eos_token_id": ends}))
    write: Callable[[Path, Layout], None] = {
        "v1": _write_sentencepiece,
        "v3": _write_sentencepiece,
        "smollm2": _write_byte_level,
        "llama3": _write_byte_level,
        "transformers 5": _write_transformers_5,
    }.get(layout.vocabulary, _write_tekken)
    write(folder, layout)
    return folder


def _write_sentencepiece(folder: Path, layout: Layout) -> None:
    shutil.copy(SENTENCEPIECE[layout.vocabulary], folder / layout.file)
    first = len(_vocabulary(layout.vocabulary)[0])
    added = {str(first + i): {"content": content, "special": True} for i, content in enumerate(layout.added)}
    own = {str(i): {"content": content, "special": True} for i, content in enumerate(("<unk>", "<s>", "</s>"))}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": own | added,
    }
    if layout.fast:
        (folder / "tokenizer.json").write_text(fast_tokenizer(layout).to_str())
        _write_config(folder, layout, settings)


def _write_tekken(folder: Path, layout: Layout) -> None:
    write_tekken(folder, layout.vocabulary.removeprefix("tekken "))
    if layout.template is not None:
        _write_config(folder, layout, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _write_byte_level(folder: Path, layout: Layout) -> None:
    (folder / "tokenizer.json").write_text(trained(layout.vocabulary), encoding="utf-8")
    _write_config(folder, layout, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_transformers_5(folder: Path, layout: Layout) -> None:
    """What it saves itself: one tokenizer.json, and the template in a file."""
    names = {"bos_token": "<s>", "unk_token": "<unk>", **layout.tokenizer}
    saved = PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer(layout), **names)
    saved.chat_template = layout.template
    saved.save_pretrained(folder)


def _write_config(folder: Path, layout: Layout, settings: dict[str, Any]) -> None:
    template = {} if layout.template is None else {"chat_template": layout.template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | layout.tokenizer | template))


def fast_tokenizer(layout: Layout) -> Tokenizer:
    """The SentencePiece vocabulary in the form of tokenizer.json, as transformers 4 has converted those of such checkpoints."""
    vocab, merges = _vocabulary("v3" if layout.vocabulary == "v3" else "v1")
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ("<unk>", "<s>", "</s>", *layout.added)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


@cache
def _vocabulary(version: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    processor = SentencePieceProcessor(model_file=str(SENTENCEPIECE[version]))
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(scores)}
    return vocab, generate_merges(vocab, scores)
