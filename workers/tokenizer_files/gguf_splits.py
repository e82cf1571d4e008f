"""How byte-level BPE splits a text before it merges, by the name that a GGUF file gives in tokenizer.ggml.pre.

The regular expressions are those of llama.cpp, which took them from the models' own tokenizer.json, except tekken's: it is Mistral's own,
of which llama.cpp's is an approximation for letters outside ASCII. They apply one after another, each within the parts of the one before.
"""

from typing import NamedTuple


class Splits(NamedTuple):
    """ignores_merges: a part that is a token as a whole becomes that token. adds_bos: where the file does not say."""

    regexes: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_NUMBERS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _AFTER_NUMBERS
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_ONE_BY_ONE = (r"\p{N}", _GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK_LLM = (
    # Letters of the alphabets with two cases, which llama.cpp lists one by one.
    *(
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
)
_DEEPSEEK_V3 = (
    *(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+"),
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED_CODER = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Of letters in ASCII, "upper" and "lower" are the others' complements, as in llama.cpp.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_THREES_FROM_THE_END = (r"\p{N}+", r"(?=(\d{3})+(?!\d))")

SPLITS: dict[str, Splits] = {
    "default": Splits(_DEFAULT),
    "falcon": Splits((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "mellum", "exaone4", "gigachat"),
            "a.x-4.0",
        ),
        Splits((_GPT2,)),
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Splits((_LLAMA3,), ignores_merges=True, adds_bos=True),
    ),
    **dict.fromkeys(("glm4", "glm5"), Splits((_LLAMA3,), ignores_merges=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Splits((_LLAMA3,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        Splits(_DIGITS_ONE_BY_ONE),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "kormo"), Splits((_QWEN2,))),
    "tekken": Splits((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "deepseek-coder": Splits(_DEEPSEEK_CODER),
    "deepseek-llm": Splits(_DEEPSEEK_LLM),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Splits(_DEEPSEEK_V3)),
    "seed-coder": Splits((_SEED_CODER,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Splits((_GPT_4O,))),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), Splits((_BLOOM,))),
    "viking": Splits((_BLOOM, r"\p{N}")),
    "superbpe": Splits(_THREES_FROM_THE_END),
}
