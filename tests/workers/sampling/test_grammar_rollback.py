"""A constraint that accepts tokens and rolls them back is as if it had never accepted them."""

from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from support.paths import DEMO_MODEL

from workers.sampling.grammar import Constraint
from workers.sampling.vocabulary import load_grammar_tokenizer

VOCAB_SIZE = 4096
VOCABULARY = load_grammar_tokenizer(DEMO_MODEL / "tokenizer.model.v3", vocab_size=VOCAB_SIZE, eos_token_ids=[2])
FREE = '%llguidance {"no_forcing": true}\n'
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}},
    },
    "required": ["name", "tags"],
}
GRAMMARS = [
    FREE + 'start: "red" | "green" | "greenish" | "blue"',
    FREE + r"start: /[0-9]{2,4}(-[a-f]{3}){1,6}/",
    FREE + "start: /[a-z]{2,}/",
    LLMatcher.grammar_from_json_schema(SCHEMA),
    'start: "only"',
]


def mask_of(constraint: Constraint) -> bytes:
    return constraint.matcher.compute_bitmask()


def allowed(constraint: Constraint) -> list[int]:
    mask = mask_of(constraint)
    return [i for i in range(VOCAB_SIZE) if mask[i // 8] >> i % 8 & 1]


def accept_allowed(constraint: Constraint, choices: list[int]) -> list[int]:
    """Accepts tokens of its masks, until the output ends; returns them."""
    taken = []
    for choice in choices:
        if constraint.is_finished:
            break
        candidates = allowed(constraint)
        taken.append(candidates[choice % len(candidates)])
        constraint.accept(taken[-1])
    assert constraint.error is None
    return taken


@settings(max_examples=60)
@given(
    grammar=st.sampled_from(GRAMMARS),
    kept=st.lists(st.integers(0, 5000), max_size=12),
    dropped=st.lists(st.integers(0, 5000), max_size=12),
    not_allowed=st.integers(0, 2),
)
def test_accept_and_rollback_is_as_if_never_accepted(grammar, kept, dropped, not_allowed):
    constraint = Constraint(VOCABULARY, grammar)
    tokens = accept_allowed(constraint, kept)
    before, was_finished = mask_of(constraint), constraint.is_finished
    num_dropped = len(accept_allowed(constraint, dropped))
    for _ in range(not_allowed):  # drafted tokens need not follow the grammar
        constraint.accept(VOCAB_SIZE - 1 if constraint.is_finished else next_not_allowed(constraint))
    if not_allowed:
        assert constraint.error is not None
    constraint.rollback(num_dropped + not_allowed)
    assert constraint.error is None
    assert (constraint.num_accepted, constraint.is_finished) == (len(tokens), was_finished)
    if not was_finished:
        assert mask_of(constraint) == before == mask_of(Constraint(VOCABULARY, grammar, tokens))
        accept_allowed(constraint, dropped)


def next_not_allowed(constraint: Constraint) -> int:
    return next(i for i in range(VOCAB_SIZE) if i not in set(allowed(constraint)))


def test_a_limit_exceeded_is_not_rolled_back():
    constraint = Constraint(VOCABULARY, FREE + 'start: s\ns: s s s | s s | "a"')
    (token,) = VOCABULARY.tokenize_str("a")
    num_accepted = 0
    while constraint.error is None:
        mask_of(constraint)
        constraint.accept(token)
        num_accepted += 1
    constraint.rollback(num_accepted)
    assert constraint.num_accepted == 0
    assert "too complex" in (constraint.error or "")
