"""Patterns of JSON schemas in llguidance's notation: what they match in every dialect."""

import pytest

from cluster.text.grammar.compiler import StructuredOutput
from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.keys import KeyPatterns
from cluster.text.grammar.patterns import all_but, portable


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("^a-z$", "^a-z$"),
        ('[^"]', r'[[^"]&&[^\x00]]'),
        ("[a-z-9]", r"[[a-z\-9]&&[^\x00]]"),
        ("[+--]", r"[[+-\-]&&[^\x00]]"),
        ("[--a]", r"[[\--a]&&[^\x00]]"),
        ("[-a-]", r"[[\-a\-]&&[^\x00]]"),
        ("[]a]", r"[[\]a]&&[^\x00]]"),
        (r"[\w-.]", r"[[[0-9A-Za-z_]\-.]&&[^\x00]]"),
        (r"[^\d]", r"[[^[\p{Nd}]]&&[^\x00]]"),
        ("[[&&~~^]", r"[[\[\&\&\~\~\^]&&[^\x00]]"),
        (r"\P{Lu}\pL", r"[\P{Lu}&&[^\x00]][\pL&&[^\x00]]"),
        (r"\[\\[a]", r"\[\\[[a]&&[^\x00]]"),
        (r"a\x00|\u0000", "a[a&&b]|[a&&b]"),
        ("(?i)a(?:b)(?<n>c)", "(?i)a(?:b)(?<n>c)"),
    ],
)
def test_how_a_pattern_is_read(pattern: str, read: str) -> None:
    assert portable(pattern) == read


def test_flags_that_one_dialect_has() -> None:
    for pattern in ("(?x)a", "(?-u:a)", "a(?U)b"):
        with pytest.raises(GrammarError, match="flags"):
            portable(pattern)


def test_a_class_of_unicode_properties_excludes_what_it_says(compiler, accepts) -> None:
    """Python's `re`, which jsonschema uses, has no such classes."""
    for pattern, good, bad in (
        (r"^\P{P}$", ["a", "é", "\\n"], ['\\"', "\\\\"]),
        (r"^[\p{Cc}x]$", ["x", "\\n"], ['\\"']),
    ):
        grammar = compiler.compile(
            StructuredOutput("json", {"type": "string", "pattern": pattern}), at_start=False, param="p"
        )
        assert all(accepts(grammar, f'"{text}"') for text in good), pattern
        assert not any(accepts(grammar, f'"{text}"') for text in bad), pattern


def test_all_texts_but_some() -> None:
    keys = KeyPatterns()
    names = ["a", "abc", "b", "", 'q"', "é", "a.c"]
    pattern = all_but(names)
    assert pattern is not None
    assert not any(keys.matches(pattern, name) for name in names)
    assert all(keys.matches(pattern, text) for text in ("ab", "abcd", "aa", "c", "q", 'q""', "e", "éé", "a/c", "\n"))
    assert all_but(["x" * 101]) is None


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("^[ab]$", ["a", "b"]),
        ("^(x|yy|é)?$", ["", "x", "yy", "é"]),
        ('^[\\\\"]$', ['"', "\\"]),
        ("^\\n$", ["\n"]),
        ("^k[0-9]{2}$", None),
        ("^[a-z]{100}$", None),
        ("b$", None),
        ("^[^\\s\\S]$", []),
    ],
)
def test_the_keys_of_a_pattern(pattern: str, keys: list[str] | None) -> None:
    assert KeyPatterns().finite(portable(pattern), 32) == keys
