"""One vocabulary for the tests of grammars: loading it takes longer than most of them."""

from collections.abc import Callable

import llguidance
import pytest
from support.paths import DEMO_MODEL

from cluster.text.grammar.compiler import GrammarCompiler
from cluster.text.tokenizer import Tokenizer, load_tokenizer
from workers.sampling.vocabulary import load_grammar_tokenizer


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="package")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=(tokenizer.eos_token_id,))


@pytest.fixture(scope="package")
def vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    return load_grammar_tokenizer(
        tokenizer.path, vocab_size=tokenizer.vocab_size, eos_token_ids=(tokenizer.eos_token_id,)
    )


@pytest.fixture(scope="package")
def accepts(vocabulary: llguidance.LLTokenizer) -> Callable[[str, str], bool]:
    """Whether a grammar accepts a text as a whole."""

    def accepts(grammar: str, text: str) -> bool:
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        ids = vocabulary.greedy_tokenize(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return accepts
