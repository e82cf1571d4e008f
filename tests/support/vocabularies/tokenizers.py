"""Small tokenizers, trained here, in the forms that checkpoints have; and what transformers makes of each.

llama3     byte-level, Llama 3's regular expression, ignore_merges, BOS in front
smollm2    byte-level, digits one by one, special tokens in the vocabulary, no BOS
llama2     ▁ as a space, byte fallback, a space before each part of a text (Prepend), as converted by transformers 4
metaspace  the same with a Metaspace pre-tokenizer, as saved by transformers 5
unigram    SentencePiece's other model, also with a Metaspace pre-tokenizer and byte fallback; the others are BPE
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("llama3", "smollm2", "llama2", "metaspace", "unigram")
VOCAB_SIZE = 640
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 12345\n\tif not x:\n        pass\n",
    "naïve café: 日本語のテキスト, ελληνικά, кириллица, 😀👩‍👩‍👧",
    "I'm sure they'll say it's what we've done; don't you? 3.14159 2024-01-02",
    '{"name": "add", "arguments": {"a": 1, "b": [true, null]}}',
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama2": ["<unk>", "<s>", "</s>"],
    "metaspace": ["<unk>", "<s>", "</s>"],
    "unigram": ["<unk>", "<s>", "</s>"],
}
NAMED = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "unigram": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
# Not special: it stays in the output.
PLAIN = "<tool_call>"


@cache
def trained(kind: str) -> str:
    """The tokenizer.json of a kind."""
    byte_level = kind in ("llama3", "smollm2")
    tokenizer = Tokenizer(
        models.BPE(ignore_merges=kind == "llama3")
        if byte_level
        else models.Unigram()
        if kind == "unigram"
        else models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    special = SPECIAL[kind]
    if byte_level:
        byte_part = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if kind == "smollm2"
            else pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_part])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        listed = special if kind == "smollm2" else []
    else:
        if kind == "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = ["▁"]
        listed = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    common = {"vocab_size": VOCAB_SIZE, "initial_alphabet": alphabet, "special_tokens": listed, "show_progress": False}
    trainer = (
        trainers.UnigramTrainer(unk_token="<unk>", **common)
        if kind == "unigram"
        else trainers.BpeTrainer(limit_alphabet=300, **common)
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    if kind == "unigram":
        spec["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(PLAIN, special=False, normalized=False)])
    if kind != "smollm2":
        bos = NAMED[kind]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, kind: str, **config: Any) -> Path:
    """The files that transformers saves. config: of tokenizer_config.json, in addition. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(trained(kind), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED[kind], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@cache
def reference(kind: str) -> PreTrainedTokenizerFast:
    """What transformers makes of it."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained(kind)), **NAMED[kind])
