"""Text in which some strings are special tokens, such as `<|im_end|>`, to token ids; and how a client's text is kept from being one.

A client's strings get a mark, a noncharacter of Unicode, wherever a special token would begin in them, and at the edges where one
could grow together with what a template writes beside them. Marked strings match no special token; `encode` takes the marks out
again. Knows no templates.

Worked example with the mark shown as ¦ and the special token <s>: protect("a <s> b") -> "a <¦s> b", which encodes as the text "a <s> b".
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cluster.text.chat.template_files import AddedToken
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError

_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


class SpecialText:
    """One vocabulary with its special tokens. `legacy`: see TemplateFiles."""

    def __init__(self, tokenizer: Tokenizer, added_tokens: Mapping[str, AddedToken], *, legacy: bool) -> None:
        self._tokenizer = tokenizer
        self._legacy = legacy
        control = {str(tokenizer.sp.id_to_piece(i)): AddedToken(i) for i in tokenizer.control_token_ids}
        self._tokens: dict[str, AddedToken] = control | dict(added_tokens)
        # One expression of hundreds of alternatives would try each at every bracket: 2 s for 100 kB of them.
        self._lengths = sorted({len(content) for content in self._tokens}, reverse=True)
        self._first_char = re.compile("[" + re.escape("".join({content[0] for content in self._tokens})) + "]")
        self._inner_chars = {char for content in self._tokens for char in content[1:]}
        self._outer_chars = {char for content in self._tokens for char in content[:-1]}

    def __contains__(self, content: str) -> bool:
        return content in self._tokens

    def protect(self, text: str, mark: str) -> str:
        """For text that a template writes as it is; white space stays at its edges, where templates strip it."""
        body = text.strip()
        if not body:
            return text
        start = text.index(body)
        before = mark if body[0] in self._inner_chars else ""
        behind = mark if body[-1] in self._outer_chars else ""
        return f"{text[:start]}{before}{self._protect_inside(body, mark)}{behind}{text[start + len(body) :]}"

    def protect_json(self, value: Any, mark: str) -> Any:
        """For data whose strings a template compares, or writes in quotes: no marks at their edges."""
        if isinstance(value, str):
            return self._protect_inside(value, mark)
        if isinstance(value, Mapping):
            return {self._protect_inside(k, mark): self.protect_json(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect_json(item, mark) for item in value]
        return value

    def _protect_inside(self, text: str, mark: str) -> str:
        cuts = [start + 1 for start, _ in self._find(text)]
        return mark.join(text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)) if cuts else text

    def encode(self, text: str, mark: str) -> tuple[list[int], int]:
        """(ids, how many of them at the end stand for text behind the last special token)."""
        ids: list[int] = []
        num_last = 0
        parts = self._split(text)
        for i in range(0, len(parts), 2):
            before = self._tokens[parts[i - 1]] if i else None
            behind = self._tokens[parts[i + 1]] if i + 1 < len(parts) else None
            part = parts[i]
            if before is not None and before.rstrip:
                part = part.lstrip()
            if behind is not None and behind.lstrip:
                part = part.rstrip()
            part = part.replace(mark, "")
            encoded = self._encode_part(part, is_first=i == 0) if part else []
            ids += encoded
            num_last = len(encoded)
            if behind is not None:
                ids.append(behind.id)
        return ids, num_last

    def _find(self, text: str) -> Iterator[tuple[int, str]]:
        """Where special tokens begin, also within one another; the longest at each place."""
        for match in self._first_char.finditer(text):
            at = match.start()
            content = next((text[at : at + n] for n in self._lengths if text[at : at + n] in self._tokens), None)
            if content is not None:
                yield at, content

    def _split(self, text: str) -> list[str]:
        """text, special token, text, special token, ..., text."""
        parts: list[str] = []
        end = 0
        for at, content in self._find(text):
            if at >= end:
                parts += [text[end:at], content]
                end = at + len(content)
        return [*parts, text[end:]]

    def _encode_part(self, text: str, *, is_first: bool) -> list[int]:
        if is_first or self._legacy:
            return self._tokenizer.encode(text, bos=False)
        return self._tokenizer.encode_continuation(text)


def free_marks(texts: Iterable[str], num: int) -> list[str]:
    """Noncharacters that occur in none of the texts. Raises RequestError when there are not enough."""
    used = set().union(*texts)
    free = [mark for mark in _NONCHARACTERS if mark not in used]
    if len(free) < num:
        raise RequestError(
            "The messages hold too many Unicode noncharacters (U+FDD0 to U+FDEF); remove them.", param="messages"
        )
    return free[:num]
