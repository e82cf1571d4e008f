"""A vocabulary in llguidance's form: which bytes each token id adds to a text, and which ids end one.

Gateway and engine build it from the same file, so the engine can follow every grammar that the gateway accepts. Knows llguidance; no torch,
no requests, no templates, and of the tokenizer's file only the table of its pieces.

A Lark grammar names a control token by id, `<[5]>`, or by name between angle brackets. llguidance reads `<[...]>` as ids, so a name
loses its own square brackets: `[TOOL_CALLS]` is `<TOOL_CALLS>`, `[/INST]` is `</INST>`, `</s>` stays `</s>`.
"""

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from workers.errors import ConfigError
from workers.tokenizer_files.opening import open_model
from workers.tokenizer_files.pieces import PieceTable, TokenizerModel

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
    """The vocabulary in the tokenizer's file at `path`; see `grammar_tokenizer`. Raises ConfigError for a file that it cannot use."""
    return grammar_tokenizer(open_model(Path(path)), vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def grammar_tokenizer(model: TokenizerModel, *, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """For masks of `vocab_size` tokens, the model's number of logits.

    A token is its bytes. No text contains a control token or the unknown token. Two kinds of ids match nothing: those that the tokenizer
    lacks, and the byte-fallback token of the space. That one would be a second way to write a space, which the detokenizer would never
    drop. Raises ConfigError for a tokenizer of another model.
    """
    return LLTokenizer(TokenizerWrapper(_Vocabulary(model, vocab_size, eos_token_ids)), eos_token=list(eos_token_ids))


class _Vocabulary:
    """The interface that TokenizerWrapper reads."""

    def __init__(self, model: TokenizerModel, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        added = {content: token for content, token in model.added_tokens.items() if token.id < vocab_size}
        pieces = model.pieces.with_added(added)
        size = len(pieces.names)
        if size > vocab_size:
            raise ConfigError(
                f"The tokenizer has {size} tokens but the model only {vocab_size}.",
                remedy="Use the tokenizer that belongs to the model.",
            )
        self._model = model
        self.bos_token_id = model.special.bos
        self.eos_token_id = eos_token_ids[0]
        unk = model.special.unk
        self.special_token_ids = [i for i in range(size) if pieces.names[i] and (pieces.is_control[i] or i == unk)]
        named = set(self.special_token_ids)
        self.tokens = [_name_of(pieces.names[i]) if i in named else _text_of(pieces, i) for i in range(size)]
        self.tokens += [b""] * (vocab_size - size)
        # Only for texts that the tokenizer cannot encode: every byte has a token of its own, a space may have a piece.
        self._byte_tokens = {
            token[0]: i for i, token in reversed(list(enumerate(self.tokens))) if len(token) == 1 and i not in named
        }

    def __call__(self, text: str) -> list[int]:
        """The tokens of `text` in the middle of another text. llguidance asks for them where a grammar leaves no choice."""
        ids = self._model.encode_continuation(text)
        if b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return [self._byte_tokens[byte] for byte in text.encode() if byte in self._byte_tokens]


def _name_of(name: str) -> bytes:
    return f"<{name[1:-1]}>".encode() if name.startswith("[") and name.endswith("]") else name.encode()


def _text_of(pieces: PieceTable, token_id: int) -> bytes:
    part = pieces.bytes_of(token_id)
    return b"" if part == b" " and pieces.partial[token_id] is not None and not pieces.byte_level else part
