"""What an engine keeps of requests that ended, were aborted, or whose grammar failed: nothing but cached blocks."""

import gc
from collections import Counter

import pytest
from support.fakes.engines import make_config, make_request
from support.paths import DEMO_MODEL

from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput
from cluster.text.tokenizer import load_tokenizer
from workers.engine.core import EngineCore
from workers.engine.llm_engine import LLMEngine

TOKENIZER = load_tokenizer(DEMO_MODEL)
OURS = ("workers.", "llguidance.")


@pytest.fixture(scope="module", params=[False, True], ids=["one by one", "overlap"])
def core(request: pytest.FixtureRequest) -> EngineCore:
    return LLMEngine(make_config(DEMO_MODEL, tokenizer_path=str(TOKENIZER.path), overlap=request.param)).core


@pytest.fixture(scope="module")
def grammars(core: EngineCore) -> list[str]:
    model = core.config.model
    compiler = GrammarCompiler(TOKENIZER, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
    outputs = [StructuredOutput("regex", f"[a-z]{{{i},}}") for i in range(1, 8)]
    return [compiler.compile(output, at_start=False, param="regex") for output in outputs]


def run(core: EngineCore, grammars: list[str], name: str, count: int) -> None:
    """Every third with a grammar; every fifth is aborted, at once or after a step; every seventh has a grammar that cannot be used."""
    for i in range(count):
        grammar = grammars[i % len(grammars)] if i % 3 == 0 else "no grammar" if i % 7 == 0 else None
        request = make_request(
            f"{name}-{i}", [1, 300 + i, 400], max_tokens=4, ignore_eos=grammar is None, grammar=grammar
        )
        core.add_request(request)
        if i % 5 == 0:
            if i % 2:
                core.step()
            core.abort(request.request_id)
        core.step()
    while core.has_work():
        core.step()
        core.take_cache_events()


def alive() -> Counter[str]:
    gc.collect()
    kinds = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
    return Counter({kind: number for kind, number in kinds.items() if kind.startswith(OURS)})


def test_nothing_is_kept(core, grammars):
    run(core, grammars, "warm", 25)
    before = alive()
    run(core, grammars, "more", 70)
    assert core.num_requests == core.grammars.num_compiling == core.kv_cache.pool.num_used == 0
    assert len(core.kv_cache.pool.cached_hashes) <= core.kv_cache.pool.num_blocks
    grown = alive() - before
    assert grown.total() < 10, f"kept: {grown.most_common(5)}"
