"""Finds special tokens, such as `<|im_end|>`, in text, and prevents a client's text from producing any.

A client's strings get a mark, a Unicode noncharacter, inside each special token they contain, and at edges where the template's own
text next to them could complete one. Marked strings match no special token. An added token that is not special is text as any other,
which a client may write. Knows no templates and no vocabulary.

Worked example with the mark shown as ¦ and the special token <s>: protect("a <s> b") -> "a <¦s> b", and split("a <s> b") -> ["a ", "<s>",
" b"].
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from workers.errors import RequestError
from workers.tokenizer_files.pieces import AddedToken

_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


class SpecialTokens:
    """The strings that are one token each."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = dict(tokens)
        self._special = {content for content, token in tokens.items() if token.special}
        # A regular expression with hundreds of alternatives would try each of them at every bracket: 2 s for 100 kB of brackets.
        self._lengths = sorted({len(content) for content in self._tokens}, reverse=True)
        first_chars = "".join({content[0] for content in self._tokens})
        self._first_char = re.compile(f"[{re.escape(first_chars)}]" if first_chars else r"(?!)")
        self._inner_chars = {char for content in self._special for char in content[1:]}
        self._outer_chars = {char for content in self._special for char in content[:-1]}

    def __contains__(self, content: str) -> bool:
        return content in self._tokens

    def __getitem__(self, content: str) -> AddedToken:
        return self._tokens[content]

    @property
    def max_chars(self) -> int:
        """Of the longest one."""
        return max(self._lengths, default=0)

    def split(self, text: str) -> list[str]:
        """text, special token, text, special token, ..., text."""
        parts: list[str] = []
        end = 0
        for at, content in self._find(text):
            if at >= end and not (self._tokens[content].single_word and _touches_word(text, at, at + len(content))):
                parts += [text[end:at], content]
                end = at + len(content)
        return [*parts, text[end:]]

    def protect(self, text: str, mark: str) -> str:
        """For text that the template writes unchanged. The marks go inside the outer white space, which templates strip."""
        body = text.strip()
        if not body:
            return text
        start = text.index(body)
        before = mark if body[0] in self._inner_chars else ""
        after = mark if body[-1] in self._outer_chars else ""
        return f"{text[:start]}{before}{self._protect_inside(body, mark)}{after}{text[start + len(body) :]}"

    def protect_json(self, value: Any, mark: str) -> Any:
        """For data whose strings the template compares or writes in quotes: no marks at their edges."""
        if isinstance(value, str):
            return self._protect_inside(value, mark)
        if isinstance(value, Mapping):
            return {self._protect_inside(k, mark): self.protect_json(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect_json(item, mark) for item in value]
        return value

    def _protect_inside(self, text: str, mark: str) -> str:
        cuts = [start + 1 for start, _ in self._find(text, only_special=True)]
        return mark.join(text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)) if cuts else text

    def _find(self, text: str, *, only_special: bool = False) -> Iterator[tuple[int, str]]:
        """Where special tokens start, including inside one another; the longest at each position."""
        tokens = self._special if only_special else self._tokens
        for match in self._first_char.finditer(text):
            at = match.start()
            content = next((text[at : at + n] for n in self._lengths if text[at : at + n] in tokens), None)
            if content is not None:
                yield at, content


def _touches_word(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return any(char == "_" or char.isalnum() for char in before + after)


def free_marks(texts: Iterable[str], num: int) -> list[str]:
    """Noncharacters that occur in none of the texts. Raises RequestError if there are not enough."""
    used = set().union(*texts)
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    if len(free) < num:
        raise RequestError(
            "The messages contain too many Unicode noncharacters (U+FDD0 to U+FDEF).",
            remedy="Remove them.",
            param="messages",
        )
    return free[:num]
