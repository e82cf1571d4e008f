"""A SentencePiece vocabulary in llguidance's form: which bytes each token id adds to a text, and which ids end one.

Gateway and engine build it from the same file, so the engine can follow every grammar that the gateway accepts. Knows llguidance and
SentencePiece; no torch, no requests, no templates.

A Lark grammar names a control token by id, `<[5]>`, or by name between angle brackets. llguidance reads `<[...]>` as ids, so a name
loses its own square brackets: `[TOOL_CALLS]` is `<TOOL_CALLS>`, `[/INST]` is `</INST>`, `</s>` stays `</s>`.
"""

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from sentencepiece import SentencePieceProcessor

from workers.errors import ConfigError

_SPACE = "▁"
# Encoded before a text and cut off again, together with the space that SentencePiece puts before a text's first word.
_ANCHOR = "\n"
# Limits of llguidance's parser, which bound the work for one token. A row holds the items of one byte; the time that an ambiguous grammar
# such as `s: s s | "a"` takes grows with their square. JSON schemas are not ambiguous in that way, and an object with 200 optional
# properties needs 800 items: up to 40 ms for a mask. Grammars that users write get 256: up to 15 ms for a mask and 6 ms for a token, the
# part that lets no other thread run. Lexer states, by default 250,000: each takes up to 2 kB, and every request has its own.
_SCHEMA_LIMITS = LLParserLimits(
    max_items_in_row=800, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False
)
_LARK_LIMITS = LLParserLimits(
    max_items_in_row=256, step_max_items=10_000, max_lexer_states=50_000, verbose_errors=False
)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher for a grammar in the form of SamplingParams.grammar, with the limits of gateway and engine. Raises nothing: see
    LLMatcher.is_error.
    """
    # The body of a user's own grammar; in its text, such quotation marks would be escaped.
    is_schema = '"json_schema"' in grammar and '"name": "body", "lark_grammar"' not in grammar
    limits = _SCHEMA_LIMITS if is_schema else _LARK_LIMITS
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def load_grammar_tokenizer(path: str | Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The vocabulary in the SentencePiece model at `path`, for masks of `vocab_size` tokens, the model's number of logits.

    A token is its piece with U+2581 as a space, or the byte of a byte-fallback token. No text contains a control token or the unknown
    token. Two kinds of ids match nothing: those that the tokenizer lacks, and the byte-fallback token of the space. That one would be a
    second way to write a space, which the detokenizer would never drop. Raises ConfigError for a file that is not such a model.
    """
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
        raise ConfigError(f"{path} is not a SentencePiece model: {e}.") from e
    vocabulary = _Vocabulary(sp, vocab_size, eos_token_ids)
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(eos_token_ids))


class _Vocabulary:
    """The interface that TokenizerWrapper reads."""

    def __init__(self, sp: SentencePieceProcessor, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        size = sp.vocab_size()
        if size > vocab_size:
            raise ConfigError(
                f"The tokenizer has {size} tokens but the model only {vocab_size}.",
                remedy="Use the tokenizer that belongs to the model.",
            )
        self._sp = sp
        self.bos_token_id = sp.bos_id()
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
        self.tokens = [_token_bytes(sp, i) for i in range(size)] + [b""] * (vocab_size - size)
        # Only for texts that SentencePiece cannot encode: every byte has a token of its own, the space its piece.
        self._byte_tokens = {self.tokens[i][0]: i for i in range(size) if sp.is_byte(i) and self.tokens[i]}
        self._byte_tokens[ord(" ")] = sp.piece_to_id(_SPACE)

    def __call__(self, text: str) -> list[int]:
        """The tokens of `text` in the middle of another text. llguidance asks for them where a grammar leaves no choice."""
        anchor: list[int] = self._sp.encode(_ANCHOR)
        ids: list[int] = self._sp.encode(_ANCHOR + text)
        if ids[: len(anchor)] == anchor and b"".join(self.tokens[i] for i in ids[len(anchor) :]) == text.encode():
            return ids[len(anchor) :]
        return [self._byte_tokens[byte] for byte in text.encode()]


def _token_bytes(sp: SentencePieceProcessor, token_id: int) -> bytes:
    piece: str = sp.id_to_piece(token_id)
    if sp.is_byte(token_id):
        byte = int(piece[3:5], 16)
        return b"" if byte == ord(" ") else bytes((byte,))
    if sp.is_control(token_id) or sp.is_unknown(token_id):
        return f"<{piece[1:-1]}>".encode() if piece.startswith("[") and piece.endswith("]") else piece.encode()
    return piece.replace(_SPACE, " ").encode()
