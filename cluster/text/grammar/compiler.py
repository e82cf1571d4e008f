"""Compiles structured-output options (JSON schema, regular expression, choice, Lark) into the grammar string the engine enforces.

Rejects what llguidance cannot enforce, in bounded time and memory: sizes are limited here, schemas are rewritten (json_schema.py), a first
mask and a short random walk are computed within a budget of CPU time, and llguidance's own limits do the rest. Knows no HTTP and no
sampling.

White space in JSON: wherever JSON allows it, nothing, one space, or a newline and up to 32 spaces of indentation. That covers compact,
`json.dumps` and indented documents, and keeps a model from emitting blanks forever.
"""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.json_schema import check_divisors, check_unicode, normalized
from cluster.text.grammar.keys import KeyPatterns
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.sampling.vocabulary import grammar_tokenizer, new_matcher

GrammarKind = Literal["json", "json_object", "regex", "choice", "grammar"]

JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,32}"}
MAX_PATTERN_CHARS = 10_000
MAX_CHOICES = 10_000
MAX_CHOICES_CHARS = 100_000
MAX_LARK_CHARS = 20_000
MAX_LARK_LINES = 500  # rules are resolved by recursion; a chain of 3,000 crashed the process
_PROBE_STEPS = 16
# Of CPU time to check one grammar, between two calls of llguidance. The largest within the bounds take 0.8 s, usual ones milliseconds.
MAX_CHECK_S = 1.0
# These would need the sampler: another temperature, or removing tokens again.
_RULE_ATTRIBUTE = re.compile(r"^[ \t]*[?!]?[\w-]+\s*\[[^\]\n]*?\b(temperature|stop|stop_capture)\b", re.MULTILINE)
# Otherwise llguidance computes every forced continuation before a token: 2 s per token for (a{1000}){1000}.
_LARK_OPTIONS = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the output must match. `value` by kind: json: a schema (dict or bool); json_object: None; regex: a pattern; choice: a list of
    strings; grammar: text in Lark or GBNF notation.
    """

    kind: GrammarKind
    value: Any = None


class GrammarCompiler:
    """Compiles and checks grammars for one vocabulary. `compile` may run in a thread: it shares no state."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        cpu_time: Callable[[], float] = time.thread_time,
    ) -> None:
        self._cpu_time = cpu_time
        self.tokenizer = tokenizer
        self._vocabulary = grammar_tokenizer(tokenizer.model, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._keys = KeyPatterns()
        self._leading_space = sum(1 << i for i, starts in enumerate(tokenizer.pieces.starts_with_space) if starts)

    def compile(self, output: StructuredOutput, *, at_start: bool, param: str) -> str:
        """The grammar for SamplingParams.grammar. Raises RequestError naming `param`.

        at_start: whether the detokenizer will drop a space at the start of the text (a chat answer, an empty prompt). The grammar then
        allows one more space, and requires it if the text itself may start with one, so that the visible text matches.
        """
        try:
            body = self._body(output)
            plain = wrap(body)
            opens_with_space = self.check(plain)
            if not at_start or not self._leading_space:  # a byte-level vocabulary has no space that is dropped
                return plain
            grammar = wrap(body, start='" " @body' if opens_with_space else '" "? @body')
            self.check(grammar)
        except GrammarError as e:
            message = re.sub(r"^it\b", _NOUNS[output.kind], e.message)
            raise RequestError(f"{param}: {message}", remedy=e.remedy, param=param) from None
        return grammar

    def json_body(self, schema: Any) -> dict[str, Any]:
        """The body of a grammar for documents of a schema. Raises GrammarError."""
        return {"json_schema": self.normalized(schema) | {"x-guidance": JSON_OPTIONS}}

    def normalized(self, schema: Any) -> dict[str, Any]:
        """The schema in a form that llguidance enforces exactly or more strictly. Raises GrammarError."""
        return normalized(schema, self._keys)

    def _body(self, output: StructuredOutput) -> dict[str, Any]:
        match output.kind:
            case "json":
                return self.json_body(output.value)
            case "json_object":
                return self.json_body({"type": "object"})
            case "regex":
                return _regex_body(output.value)
            case "choice":
                return _choice_body(output.value)
            case "grammar":
                return _lark_body(output.value, self.normalized)

    def check(self, grammar: str) -> bool:
        """Whether a text of this grammar may start with a space. Raises GrammarError if the grammar cannot be used."""
        begun = self._cpu_time()
        matcher = new_matcher(self._vocabulary, grammar)
        first = self._mask(matcher)
        # Rejects now what becomes too large only in use, such as an object with a thousand optional properties.
        rng, mask = random.Random(0), first
        for _ in range(_PROBE_STEPS):
            if matcher.is_stopped() or not matcher.consume_token(random_token(mask, rng)):
                break
            if matcher.is_stopped():
                break
            if self._cpu_time() - begun > MAX_CHECK_S:
                raise GrammarError(
                    f"checking it takes more than {MAX_CHECK_S:g} s of CPU time.",
                    remedy="Make it smaller, or less ambiguous.",
                )
            mask = self._mask(matcher)
        if matcher.is_error():
            raise _explain(matcher.get_error())
        return bool(first & self._leading_space)

    def _mask(self, matcher: LLMatcher) -> int:
        if matcher.is_error():
            raise _explain(matcher.get_error())
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise _explain(matcher.get_error())
        if not mask:
            raise GrammarError("no text matches it.")
        return mask


def wrap(body: dict[str, Any], *, start: str = "@body") -> str:
    """A grammar in llguidance's JSON format. body: {"json_schema": ...} or {"lark_grammar": ...}; `start` refers to it as @body."""
    return json.dumps({"grammars": [{"lark_grammar": f"{_LARK_OPTIONS}start: {start}"}, {"name": "body", **body}]})


def _regex_body(pattern: Any) -> dict[str, Any]:
    if not isinstance(pattern, str) or not pattern:
        raise GrammarError("a regular expression must be a non-empty string.")
    if len(pattern) > MAX_PATTERN_CHARS:
        raise GrammarError(
            f"the regular expression has {len(pattern):,} characters.", remedy=f"Use at most {MAX_PATTERN_CHARS:,}."
        )
    check_unicode(pattern)
    return {"lark_grammar": f"start: PATTERN\nPATTERN: /{regex_to_lark(pattern, '')}/"}


def _choice_body(choices: Any) -> dict[str, Any]:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise GrammarError("choices must be a list of one or more non-empty strings.")
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICES_CHARS:
        raise GrammarError(
            "there are too many choices.",
            remedy=f"Use at most {MAX_CHOICES:,} choices with {MAX_CHOICES_CHARS:,} characters in total.",
        )
    if len(set(choices)) < len(choices):
        raise GrammarError("the same choice is listed twice.")
    for choice in choices:
        check_unicode(choice)
    # One terminal: a few thousand alternatives of a rule would overflow the parser.
    return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices))}


def _lark_body(text: Any, normalize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(text, str) or not text.strip():
        raise GrammarError("a grammar must be text in Lark or GBNF notation.")
    if len(text) > MAX_LARK_CHARS or text.count("\n") > MAX_LARK_LINES:
        raise GrammarError(
            "the grammar is too large.", remedy=f"Use at most {MAX_LARK_CHARS:,} characters and {MAX_LARK_LINES} lines."
        )
    check_unicode(text)
    if re.search(r"^[ \t]*%llguidance", text, re.MULTILINE):
        raise GrammarError("%llguidance options cannot be set.")
    ignored = _RULE_ATTRIBUTE.search(text)
    if ignored:
        raise GrammarError(
            f"the rule attribute {ignored[1]!r} has no effect here.",
            remedy="Remove it; instead of stop, use suffix or lazy.",
        )
    try:
        lark = any_to_lark(text)
    except Exception as e:  # the converter raises plain errors of many kinds
        raise GrammarError("the GBNF grammar cannot be parsed.", remedy="Check its syntax.") from e
    schemas, parts, end = [], [], 0
    for match in re.finditer(r"%json\s*", lark):
        if match.start() < end:  # inside a schema
            continue
        parts.append(lark[end : match.end()])
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, match.end())
        except (ValueError, RecursionError) as e:
            raise GrammarError("the JSON schema after %json cannot be parsed.") from e
        schemas.append(schema)
        parts.append(json.dumps(normalize(schema)))
    check_divisors(schemas)
    lark = "".join([*parts, lark[end:]])
    return {"lark_grammar": lark}


_NOUNS: dict[GrammarKind, str] = {
    "json": "the schema",
    "json_object": "the schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}


def random_token(mask: int, rng: random.Random) -> int:
    """The index of a random set bit: a token the mask allows."""
    chosen = mask >> rng.randrange(mask.bit_length()) if mask else 0
    low = mask.bit_length() - chosen.bit_length()
    return low + (chosen & -chosen).bit_length() - 1


def _explain(error: str) -> GrammarError:
    """llguidance's message in our words, without the grammar it repeats."""
    keys = re.match(r"Unimplemented keys: \[(.*)\]", error)
    if keys:
        return GrammarError(f"the schema uses {keys[1]}, which cannot be enforced.", remedy="Remove it.")
    if error.startswith("oneOf"):
        return GrammarError(
            "the schema uses oneOf with branches that may overlap, which cannot be enforced.", remedy="Use anyOf."
        )
    if error.startswith("NoExtension"):
        return GrammarError("no text matches it.")
    if re.search(r"too (large|many|complex|deep)|fuel|max is|limit|precomputation", error, re.IGNORECASE):
        return GrammarError("it is too complex.", remedy="Make it smaller, or its bounds narrower.")
    if error.startswith("panic"):
        return GrammarError("it cannot be used.")
    reason = re.search(r"^error: (.*)$", error, re.MULTILINE)
    first = reason[1] if reason else error.split("\n", 1)[0]
    return GrammarError(f"it cannot be used: {first[:200].rstrip('.')}.")
