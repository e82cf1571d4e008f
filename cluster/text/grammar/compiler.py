"""What an output must look like, as the grammar string the engine's llguidance takes: JSON schemas, regular expressions, choices, Lark.

Knows which of them can be done, and refuses the others with a sentence, in bounded time and memory: sizes are capped here, a first
mask and a short random walk are computed, and llguidance's own fuel limits do the rest. Knows no HTTP and no sampling.

Whitespace in JSON: at each place where JSON allows it, one space, or a newline and up to 32 spaces of indentation, or nothing.
That covers compact, `json.dumps` and indented documents, and a model cannot go on emitting blanks for ever.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from cluster.text.grammar.json_schema import GrammarError, check_divisors, check_schema, check_unicode, tightened
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.sampling.vocabulary import load_grammar_tokenizer, new_matcher

GrammarKind = Literal["json", "json_object", "regex", "choice", "grammar"]

JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,32}"}
MAX_PATTERN_CHARS = 10_000
MAX_CHOICES = 10_000
MAX_CHOICES_CHARS = 100_000
MAX_LARK_CHARS = 20_000
MAX_LARK_LINES = 500  # rules are followed by recursion too; 3,000 in a row ended the process
_PROBE_STEPS = 16
# They ask the sampler for something: another temperature, tokens taken back.
_RULE_ATTRIBUTE = re.compile(r"^[ \t]*[?!]?[\w-]+\s*\[[^\]\n]*?\b(temperature|stop|stop_capture)\b", re.MULTILINE)
# Without it, llguidance works out every forced continuation before a token: 2 s a token for (a{1000}){1000}.
_LARK_OPTIONS = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """`value` by kind: json: a schema (dict or bool); json_object: None; regex: a pattern; choice: a list of strings; grammar: Lark or
    GBNF text."""

    kind: GrammarKind
    value: Any = None


class GrammarCompiler:
    """Checks grammars against one vocabulary. `compile` may run in a thread: it waits for nothing and shares nothing."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = load_grammar_tokenizer(tokenizer.path, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._leading_space = sum(1 << i for i, starts in enumerate(tokenizer.pieces.starts_with_space) if starts)

    def compile(self, output: StructuredOutput, *, at_start: bool, param: str) -> str:
        """The grammar for SamplingParams.grammar. Raises RequestError naming `param`.

        at_start: the detokenizer drops a space that the text opens with (an answer, an empty prompt). The grammar then allows
        one space more, and demands it where the text itself may begin with one, so that the visible text conforms.
        """
        try:
            body = _BODIES[output.kind](output.value)
            plain = wrap(body)
            opens_with_space = self.check(plain)
            if not at_start:
                return plain
            grammar = wrap(body, start='" " @body' if opens_with_space else '" "? @body')
            self.check(grammar)
        except GrammarError as e:
            sentence = re.sub(r"^it\b", _NOUNS[output.kind], str(e))
            raise RequestError(f"{param}: {sentence}", param=param) from None
        return grammar

    def check(self, grammar: str) -> bool:
        """Whether a text of this grammar may open with a space. Raises GrammarError when the grammar cannot be used."""
        matcher = new_matcher(self._vocabulary, grammar)
        first = self._mask(matcher)
        # What explodes only when it is used, such as an object of a thousand optional properties, shall be refused now.
        rng, mask = random.Random(0), first
        for _ in range(_PROBE_STEPS):
            if matcher.is_stopped() or not matcher.consume_token(_pick(mask, rng)):
                break
            if matcher.is_stopped():
                break
            mask = self._mask(matcher)
        if matcher.is_error():
            raise GrammarError(_explain(matcher.get_error()))
        return bool(first & self._leading_space)

    def _mask(self, matcher: LLMatcher) -> int:
        if matcher.is_error():
            raise GrammarError(_explain(matcher.get_error()))
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise GrammarError(_explain(matcher.get_error()))
        if not mask:
            raise GrammarError("no text matches it.")
        return mask


def wrap(body: dict[str, Any], *, start: str = "@body") -> str:
    """llguidance's JSON form of `body` ({"json_schema": ...} or {"lark_grammar": ...}), which `start` refers to as @body."""
    return json.dumps({"grammars": [{"lark_grammar": f"{_LARK_OPTIONS}start: {start}"}, {"name": "body", **body}]})


def json_body(schema: Any) -> dict[str, Any]:
    schema = check_schema(schema)
    if schema is True:
        schema = {}
    if schema is False:
        raise GrammarError("no document matches the schema false.")
    return {"json_schema": {**tightened(schema), "x-guidance": JSON_OPTIONS}}


def _json_object_body(_: None) -> dict[str, Any]:
    return json_body({"type": "object"})


def _regex_body(pattern: Any) -> dict[str, Any]:
    if not isinstance(pattern, str) or not pattern:
        raise GrammarError("a regular expression is a string that is not empty.")
    if len(pattern) > MAX_PATTERN_CHARS:
        raise GrammarError(
            f"the regular expression has {len(pattern):,} characters; at most {MAX_PATTERN_CHARS:,} are allowed."
        )
    check_unicode(pattern)
    return {"lark_grammar": f"start: PATTERN\nPATTERN: /{regex_to_lark(pattern, '')}/"}


def _choice_body(choices: Any) -> dict[str, Any]:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise GrammarError("choices are a list of one or more strings, none of them empty.")
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICES_CHARS:
        raise GrammarError(
            f"at most {MAX_CHOICES:,} choices with {MAX_CHOICES_CHARS:,} characters together are allowed."
        )
    if len(set(choices)) < len(choices):
        raise GrammarError("the same choice is listed twice.")
    for choice in choices:
        check_unicode(choice)
    # One terminal: as alternatives of a rule, a few thousand would overflow the parser.
    return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices))}


def _lark_body(text: Any) -> dict[str, Any]:
    if not isinstance(text, str) or not text.strip():
        raise GrammarError("a grammar is a text in Lark's or GBNF's notation.")
    if len(text) > MAX_LARK_CHARS or text.count("\n") > MAX_LARK_LINES:
        raise GrammarError(
            f"the grammar is too large; at most {MAX_LARK_CHARS:,} characters and {MAX_LARK_LINES} lines are allowed."
        )
    check_unicode(text)
    if re.search(r"^[ \t]*%llguidance", text, re.MULTILINE):
        raise GrammarError("%llguidance options cannot be set.")
    ignored = _RULE_ATTRIBUTE.search(text)
    if ignored:
        raise GrammarError(
            f"the rule attribute {ignored[1]!r} has no effect here; remove it (for stop, use suffix or lazy)."
        )
    try:
        lark = any_to_lark(text)
    except Exception as e:  # the converter raises plain errors of many kinds
        raise GrammarError("the GBNF grammar cannot be read; check its syntax.") from e
    schemas = []
    for match in re.finditer(r"%json\s*", lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, match.end())
        except (ValueError, RecursionError) as e:
            raise GrammarError("the JSON schema behind %json cannot be read.") from e
        schemas.append(check_schema(schema))
    check_divisors(schemas)
    return {"lark_grammar": lark}


_NOUNS: dict[GrammarKind, str] = {
    "json": "the schema",
    "json_object": "the schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}
_BODIES: dict[GrammarKind, Callable[[Any], dict[str, Any]]] = {
    "json": json_body,
    "json_object": _json_object_body,
    "regex": _regex_body,
    "choice": _choice_body,
    "grammar": _lark_body,
}


def _pick(mask: int, rng: random.Random) -> int:
    """A random set bit."""
    chosen = mask >> rng.randrange(mask.bit_length()) if mask else 0
    low = mask.bit_length() - chosen.bit_length()
    return low + (chosen & -chosen).bit_length() - 1


def _explain(error: str) -> str:
    """llguidance's message as the end of our sentence, without the grammar it repeats."""
    keys = re.match(r"Unimplemented keys: \[(.*)\]", error)
    if keys:
        return f"the schema uses {keys[1]}, which cannot be enforced; remove it."
    if error.startswith("oneOf"):
        return "the schema uses oneOf with branches that may overlap, which cannot be enforced; use anyOf."
    if error.startswith("NoExtension"):
        return "no text matches it."
    if re.search(r"too (large|many|complex|deep)|fuel|max is|limit|precomputation", error, re.IGNORECASE):
        return "it is too complex; make it smaller, or its bounds narrower."
    if error.startswith("panic"):
        return "it cannot be used."
    reason = re.search(r"^error: (.*)$", error, re.MULTILINE)
    first = reason[1] if reason else error.split("\n", 1)[0]
    return f"it cannot be used: {first[:200].rstrip('.')}."
