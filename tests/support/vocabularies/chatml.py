"""The text files of a ChatML fine-tune of Mistral v0.1: its vocabulary, tokens added to it, and no `legacy`.

`write_chatml(folder)` writes what the Hub's layout has, `chatml_reference()` is what transformers makes of it.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

V1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IM_END, IM_START, TOOL, PAD = 32_000, 32_001, 32_002, 32_003
MODEL_VOCAB_SIZE = 32_016
# id, content, special, rstrip
ADDED = (
    (0, "<unk>", True, False),
    (1, "<s>", True, False),
    (2, "</s>", True, False),
    (IM_END, "<|im_end|>", True, False),
    (IM_START, "<|im_start|>", True, False),
    (TOOL, "<tool_call>", False, False),
    (PAD, "<pad>", True, True),
)


def write_chatml(folder: Path, *, template: str | None = CHATML, **config: Any) -> Path:
    """config: of tokenizer_config.json, in addition. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(V1, folder / "tokenizer.model")
    decoder = {
        str(i): {"content": content, "special": special, "rstrip": rstrip, "lstrip": False, "normalized": False}
        for i, content, special, rstrip in ADDED
    }
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "added_tokens_decoder": decoder}
    settings |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


@cache
def chatml_reference() -> PreTrainedTokenizerFast:
    """As the tokenizer.json of such checkpoints is: every part of a text gets a leading space."""
    processor = SentencePieceProcessor(model_file=str(V1))
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(scores)}
    model = Tokenizer(BPE(vocab=vocab, merges=generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for _, content, special, rstrip in ADDED:
        token = AddedToken(content, special=special, rstrip=rstrip, normalized=False)
        _ = model.add_special_tokens([token]) if special else model.add_tokens([token])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>")
