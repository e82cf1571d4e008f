r"""Regular expressions of JSON schemas as llguidance must read them, so that every text they allow satisfies the original.

A schema's pattern is ECMA-262, llguidance reads Rust's notation, and validators often use Python's `re`. Where they differ, the result
allows what all of them allow:

    [[&&]        brackets and operators inside a class are plain characters
    \d \w \s     what every dialect counts as a digit, and so on; \D \W \S what none does
    [^"], \x00   no class contains NUL. llguidance writes a class with all control characters as "any escape", which includes \" and \\

Knows the notation only; no schemas.
"""

import re
from collections.abc import Iterator, Sequence

from cluster.text.grammar.errors import GrammarError

# Matches every text.
ANY_TEXT = "(?s:.*)"
_NOTHING = "[a&&b]"
_WITHOUT_NUL = r"&&[^\x00]]"
_ASCII_WORD = "0-9A-Za-z_"
_WORD = r"\p{L}\p{N}\p{M}\p{Pc}\u200c\u200d"
_SPACES = r"\x09-\x0d\x20\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ALL_SPACES = _SPACES + r"\x1c-\x1f\u0085\ufeff"
# What the class matches in every dialect, and what it matches in some.
_IN_ALL = {
    "d": "[0-9]",
    "D": r"[^\x00\p{Nd}]",
    "w": f"[{_ASCII_WORD}]",
    "W": rf"[^\x00{_WORD}]",
    "s": f"[{_SPACES}]",
    "S": rf"[^\x00{_ALL_SPACES}]",
}
_IN_SOME = {
    "d": r"[\p{Nd}]",
    "D": "[^0-9]",
    "w": f"[{_WORD}]",
    "W": f"[^{_ASCII_WORD}]",
    "s": f"[{_ALL_SPACES}]",
    "S": f"[^{_SPACES}]",
}
_NUL = re.compile(r"\\(?:x00|u0000|x\{0+\}|u\{0+\})|\x00")
_PROPERTY = re.compile(r"\\[pP](?:\{[^}]*\}|.)", re.DOTALL)
_FLAGS = re.compile(r"\(\?([a-zA-Z-]*)[:)]")
_MAX_NESTED_CHARS = 100  # of a name in `all_but`: Rust's parser allows 250 nested groups


def portable(pattern: str) -> str:
    """The pattern in llguidance's notation. Raises GrammarError for flags that only one dialect has."""
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        if found := _NUL.match(pattern, at):
            parts.append(_NOTHING)
            at = found.end()
        elif found := _PROPERTY.match(pattern, at):
            parts.append(f"[{found[0]}{_WITHOUT_NUL}")
            at = found.end()
        elif pattern[at] == "\\":
            escape = pattern[at : at + 2]
            parts.append(_IN_ALL.get(escape[1:], escape))
            at += 2
        elif pattern[at] == "[":
            text, at = _read_class(pattern, at + 1)
            parts.append(text)
        else:
            if (found := _FLAGS.match(pattern, at)) and set(found[1]) - set("ims-"):
                raise GrammarError(f"the pattern has the flags {found[1]!r}.", remedy="Remove them.")
            parts.append(pattern[at])
            at += 1
    return "".join(parts)


def all_but(names: Sequence[str]) -> str | None:
    r"""A pattern of all texts except these; None if there is none that llguidance can read.

    ["a", "bc"] gives ^(?:|a(?:(?s:.+))|b(?:|c(?:(?s:.+))|[^\x00c](?s:.*))|[^\x00ab](?s:.*))$.
    """
    if any(len(name) > _MAX_NESTED_CHARS for name in names):
        return None

    def rest(suffixes: list[str]) -> str:
        following: dict[str, list[str]] = {}
        for suffix in suffixes:
            if suffix:
                following.setdefault(suffix[0], []).append(suffix[1:])
        options = [] if "" in suffixes else [""]
        options += [_character(first) + rest(others) for first, others in following.items()]
        others = "".join(map(_character, following))
        options.append(rf"[^\x00{others}]{ANY_TEXT}" if following else "(?s:.+)")
        return f"(?:{'|'.join(options)})"

    return f"^{rest(list(dict.fromkeys(names)))}$"


def _character(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\u{{{ord(char):x}}}"


def _read_class(pattern: str, at: int) -> tuple[str, int]:
    """The class whose opening bracket is before `at`, and the index after its closing one."""
    is_negated = pattern.startswith("^", at)
    at += is_negated
    items: list[str] = []
    # Whether the last item may begin a range, as the a of a-z; and whether it is the hyphen of one.
    may_begin = in_range = False
    if pattern.startswith("]", at):
        items, may_begin = [r"\]"], True
        at += 1
    for item, end in _class_items(pattern, at):
        at = end
        if item == "]":
            return f"[[{'^' * is_negated}{''.join(items)}]{_WITHOUT_NUL}", at
        if item == "-" and may_begin and not _ends_or_class(pattern, at):
            may_begin, in_range = False, True
        elif item[0] == "\\" and item[1:] in _IN_ALL:
            item = (_IN_SOME if is_negated else _IN_ALL)[item[1:]]
            may_begin = in_range = False
        else:
            may_begin, in_range = not in_range, False
            item = r"\x08" if item == r"\b" else f"\\{item}" if item in ("[", "&", "~", "^", "-") else item
        items.append(item)
    raise GrammarError("a pattern has an unclosed character class.")


def _ends_or_class(pattern: str, at: int) -> bool:
    """Whether no end of a range stands here: the class ends, or another class like \\d follows."""
    return pattern.startswith("]", at) or pattern[at : at + 2] in {f"\\{name}" for name in _IN_ALL}


def _class_items(pattern: str, at: int) -> Iterator[tuple[str, int]]:
    """Each character or escape of a class, and the index after it."""
    while at < len(pattern):
        found = _PROPERTY.match(pattern, at)
        length = len(found[0]) if found else 1 + (pattern[at] == "\\")
        yield pattern[at : at + length], at + length
        at += length
