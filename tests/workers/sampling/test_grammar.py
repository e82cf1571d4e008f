"""Grammars in the engine: the whole output follows its grammar, whatever else runs and wherever it continues; an error ends one request."""

import itertools
import json
import random
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher
from sentencepiece import SentencePieceProcessor
from support.checkpoints.tiny import write_tiny_checkpoint
from support.clients.random_schemas import random_schema
from support.fakes import engines
from support.fakes.engines import make_engine
from support.paths import DEMO_MODEL

from workers.engine.llm_engine import run_requests
from workers.errors import RequestError
from workers.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta
from workers.sampling import grammar as grammar_module
from workers.sampling import masks as masks_module
from workers.sampling import matcher_masks
from workers.sampling.grammar import Constraint
from workers.sampling.vocabulary import load_grammar_tokenizer

DEMO = DEMO_MODEL
TOKENIZER = DEMO / "tokenizer.model.v3"
SP = SentencePieceProcessor(model_file=str(TOKENIZER))
EOS = 2
FREE = '%llguidance {"no_forcing": true}\n'
CHOICES = FREE + 'start: "red" | "green" | "greenish" | "blue"'
NUMBERS = FREE + r"start: /[0-9]{2,4}(-[a-f]{3}){1,6}/"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5, "maxLength": 20},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "def", "é"]}, "minItems": 2, "maxItems": 5},
        "count": {"type": "integer", "minimum": 10, "maximum": 99999},
    },
    "required": ["name", "tags", "count"],
    "additionalProperties": False,
}


def schema_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": r" |\n {0,4}"})


def constrained(name: str, grammar: str | None, **params: Any) -> GenerateRequest:
    sampling = SamplingParams(**({"max_tokens": 500, "seed": 1, "grammar": grammar} | params))
    return GenerateRequest(request_id=name, prompt_token_ids=[1, *SP.encode("x = ")], sampling=sampling)


@pytest.fixture(scope="module", params=[False, True], ids=["one by one", "overlap"])
def both_ways(request):
    """Runs a test without overlap and with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines.SETTINGS, "overlap", request.param)
        yield request.param


@pytest.fixture(scope="module")
def folder(both_ways, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=SP.vocab_size(), sliding_window=24)


def new_engine(folder: Path, **overrides: Any):
    settings = {"tokenizer_path": str(TOKENIZER), "num_kv_blocks": 1000, "max_model_len": 1024}
    return make_engine(folder, **(settings | overrides))


@pytest.fixture(scope="module")
def engine(folder):
    return new_engine(folder)


def drain(core) -> dict[str, list[TokenDelta]]:
    found: dict[str, list[TokenDelta]] = {}
    while core.has_work():
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta)
    assert core.num_requests == 0
    assert core.kv_cache.pool.num_used == 0
    return found


def text_of(deltas: list[TokenDelta]) -> str:
    return SP.decode([t for d in deltas for t in d.token_ids if t != d.stop_token_id])


def add_all(core, requests):
    for request in requests:
        core.add_request(request)
    return drain(core)


def test_twenty_random_schemas_are_followed_at_temperature_1(both_ways):
    """Ten each way."""
    core = new_engine(DEMO, block_size=16, max_num_batched_tokens=512).core
    schemas = {str(seed): random_schema(seed) for seed in range(int(both_ways), 20, 2)}
    requests = [constrained(n, schema_grammar(s), seed=int(n), max_tokens=900) for n, s in schemas.items()]
    found = add_all(core, requests)
    for name, schema in schemas.items():
        assert found[name][-1].finish_reason is FinishReason.STOP, f"schema {name}"
        jsonschema.validate(json.loads(text_of(found[name])), schema)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_choices_and_patterns(engine, temperature):
    requests = [constrained(f"c{i}", CHOICES, temperature=temperature, seed=i) for i in range(8)]
    requests += [constrained(f"n{i}", NUMBERS, temperature=temperature, seed=i) for i in range(8)]
    found = add_all(engine.core, requests)
    texts = {name: text_of(deltas) for name, deltas in found.items()}
    for name, text in texts.items():
        if name.startswith("c"):
            assert text in ("red", "green", "greenish", "blue")
        else:
            assert re.fullmatch(r"[0-9]{2,4}(-[a-f]{3}){1,6}", text)
    if temperature:
        assert len(set(texts.values())) > 5


def test_an_output_ends_where_its_grammar_ends(engine):
    """With its last token where nothing can follow; with eos where something could; by length where it is not finished."""
    found = add_all(engine.core, [constrained("only", FREE + 'start: "red"')])["only"]
    assert found[-1].finish_reason is FinishReason.STOP
    assert found[-1].stop_token_id is None, "the last token is text"
    assert text_of(found) == "red"

    bias = {"logit_bias": {EOS: 100.0}}
    found = add_all(engine.core, [constrained("open", FREE + "start: /[a-z]{3,}/", **bias)])["open"]
    assert (found[-1].finish_reason, found[-1].stop_token_id) == (FinishReason.STOP, EOS)
    assert len(text_of(found)) >= 3, "eos waits until the grammar lets it"

    found = add_all(engine.core, [constrained("short", FREE + "start: /[a-z]{300}/", max_tokens=3)])["short"]
    assert [d.finish_reason for d in found] == [None, None, FinishReason.LENGTH]


def test_every_end_of_text_may_end_a_grammar(folder):
    tokenizer = load_grammar_tokenizer(TOKENIZER, vocab_size=4096, eos_token_ids=(EOS, 7))
    for eos in (EOS, 7):
        constraint = Constraint(tokenizer, FREE + "start: /[a-z]+/", SP.encode("\nab")[1:][-1:])
        constraint.accept(eos)
        assert constraint.error is None
        early = Constraint(tokenizer, FREE + "start: /[a-z]+/")
        early.accept(eos)
        assert early.error is not None


def test_log_probabilities_are_the_models_own(engine):
    plain = add_all(engine.core, [constrained("r", None, logprobs=2, temperature=0.0, max_tokens=1)])["r"][0]
    masked = add_all(engine.core, [constrained("r", CHOICES, logprobs=2, temperature=0.0)])["r"][0]
    assert masked.token_ids != plain.token_ids
    assert masked.logprobs[0].top == plain.logprobs[0].top
    assert masked.logprobs[0].logprob < plain.logprobs[0].logprob


def mixed_requests() -> list[GenerateRequest]:
    kinds: list[tuple[str | None, dict[str, Any]]] = [
        (schema_grammar(SCHEMA), {"temperature": 1.0}),
        (None, {"temperature": 0.9, "max_tokens": 40}),
        (NUMBERS, {"top_p": 0.9, "frequency_penalty": 0.5}),
        (None, {"temperature": 0.0, "max_tokens": 30, "bad_words": ((5,), (6, 7))}),
        (CHOICES, {"temperature": 0.0, "logit_bias": {9: 5.0}}),
        (None, {"allowed_token_ids": tuple(range(300, 330)), "max_tokens": 20}),
        (schema_grammar(SCHEMA), {"temperature": 2.0, "repetition_penalty": 1.2, "logprobs": 2}),
    ]
    return [constrained(str(i), grammar, seed=i, **params) for i, (grammar, params) in enumerate(kinds)]


def test_other_requests_change_nothing(folder, engine, monkeypatch):
    requests = mixed_requests()
    alone = [run_requests(engine.core, [r])[0] for r in requests]
    assert run_requests(engine.core, requests) == alone, "in one batch"
    take = grammar_module.Grammars.take_compiled

    def take_all(self, *, timeout_s=0.0):
        outcomes = []
        while self.num_compiling:
            outcomes += take(self, timeout_s=10.0)
        return outcomes

    # The requests begin together, or on a busy machine those without a grammar end before the others need their blocks.
    monkeypatch.setattr(grammar_module.Grammars, "take_compiled", take_all)
    tight = new_engine(folder, num_kv_blocks=24, max_num_batched_tokens=32)
    assert run_requests(tight.core, requests) == alone
    assert tight.core.load().num_preemptions_total > 0, "a preempted request keeps its place in the grammar"


def test_slow_masks_change_no_token(folder, engine, monkeypatch):
    """Every mask is computed apart, and every second one is late: its request leaves the step, and computes its last token again."""
    requests = mixed_requests()
    expected = [run_requests(engine.core, [r])[0] for r in requests]
    take, steps = masks_module.StepMasks.take, itertools.count()

    def often_late(self):
        found, late = take(self)
        some = {name for name in found if (next(steps) + int(name)) % 2}
        return {name: mask for name, mask in found.items() if name not in some}, late | some

    monkeypatch.setattr(masks_module, "SLOW_MASK_S", -1.0)
    monkeypatch.setattr(masks_module.StepMasks, "take", often_late)
    assert run_requests(engine.core, requests) == expected
    tight = new_engine(folder, num_kv_blocks=24, max_num_batched_tokens=32)
    assert run_requests(tight.core, requests) == expected, "with preemptions"


def test_an_engine_with_only_held_requests_waits_for_them(folder, engine, monkeypatch):
    """Nothing may end because nothing can be scheduled: the waiting request has no room before the held one ends."""
    monkeypatch.setattr(masks_module, "SLOW_MASK_S", -1.0)
    core = new_engine(folder, max_num_seqs=1).core
    for name in ("first", "second"):
        core.add_request(constrained(name, CHOICES))
    assert {deltas[-1].finish_reason for deltas in drain(core).values()} == {FinishReason.STOP}


def test_the_shortest_grammar_is_compiled_first(monkeypatch):
    gate, started, order = threading.Event(), threading.Event(), []

    def slow(tokenizer, grammar, token_ids):
        started.set()
        assert gate.wait(20)
        order.append(len(grammar))
        return Constraint(tokenizer, grammar, token_ids)

    monkeypatch.setattr(grammar_module, "Constraint", slow)
    grammars = grammar_module.Grammars(str(TOKENIZER), vocab_size=4096, eos_token_ids=(EOS,))
    texts = [FREE + f"start: /a{{{i}}}/" for i in (3, 3000, 30000, 3, 300)]
    for i, text in enumerate(texts):
        grammars.compile(str(i), text)
        assert started.wait(20), "the first begins at once"
    gate.set()
    while grammars.num_compiling:
        grammars.take_compiled(timeout_s=1.0)
    assert order == [len(texts[i]) for i in (0, 3, 4, 1, 2)]
    grammars.close()


def test_an_output_continues_anywhere(folder, engine):
    """Another engine gets the prompt and the tokens so far, as after the loss of a replica."""
    other = new_engine(folder)
    rng = random.Random(0)
    for request in mixed_requests():
        whole = run_requests(engine.core, [request])[0]
        cuts = rng.sample(range(1, len(whole)), min(5, len(whole) - 1))
        rest = [
            GenerateRequest(
                request_id=str(cut),
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                output_token_ids=whole[:cut],
            )
            for cut in cuts
        ]
        assert run_requests(other.core, rest) == [whole[len(r.output_token_ids) :] for r in rest]


@pytest.mark.parametrize(
    ("grammar", "output", "words"),
    [
        ("start: nonsense", [], "cannot be used"),
        ("", [], "cannot be used"),
        ("{]", [], "cannot be used"),
        ('start: "\\uD800"', [], "cannot be used"),
        (CHOICES, SP.encode("purple"), "do not follow"),
        (FREE + 'start: "red"', load_grammar_tokenizer(TOKENIZER, vocab_size=4096, eos_token_ids=[2]).tokenize_str("red"),
         "end the grammar"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(engine, grammar, output, words):
    core = engine.core
    request = constrained("bad", grammar)
    core.add_request(
        GenerateRequest(
            request_id="bad",
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            output_token_ids=output,
        )
    )
    core.add_request(constrained("good", CHOICES))
    found = drain(core)
    assert [(d.finish_reason, d.token_ids) for d in found["bad"]] == [(FinishReason.ERROR, [])]
    assert words in found["bad"][0].error
    assert found["good"][-1].finish_reason is FinishReason.STOP


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone(engine):
    core = engine.core
    core.add_request(constrained("ambiguous", FREE + 'start: s\ns: s s s | s s | "a"', logit_bias={EOS: -100.0}))
    core.add_request(constrained("good", schema_grammar(SCHEMA)))
    found = drain(core)
    assert found["ambiguous"][-1].finish_reason is FinishReason.ERROR
    assert "too complex" in found["ambiguous"][-1].error
    assert set(text_of(found["ambiguous"])) == {"a"}
    jsonschema.validate(json.loads(text_of(found["good"])), SCHEMA)


def test_a_request_waits_for_its_grammar_and_may_be_aborted_there(engine, monkeypatch):
    """Other requests run in the meantime."""
    core, gate = engine.core, threading.Event()

    def slow(*args):
        assert gate.wait(20)
        return Constraint(*args)

    monkeypatch.setattr(grammar_module, "Constraint", slow)
    for name in ("aborted", "waits"):
        core.add_request(constrained(name, CHOICES))
    with pytest.raises(RequestError, match="already in use"):
        core.add_request(constrained("waits", CHOICES))
    core.add_request(constrained("free", None, max_tokens=2, ignore_eos=True))
    deltas = [d.request_id for _ in range(4 + core.overlap) for d in core.step()]
    assert deltas == ["free", "free"]
    assert core.has_work()
    assert core.load().num_waiting == 2
    core.abort("aborted")
    gate.set()
    found = drain(core)
    assert set(found) == {"waits"}


def test_without_a_tokenizer_grammars_are_refused(folder):
    core = new_engine(folder, tokenizer_path=None).core
    with pytest.raises(RequestError) as caught:
        core.add_request(constrained("r", CHOICES))
    assert caught.value.param == "structured_outputs"
    assert not core.has_work()
    assert core.num_requests == 0


def test_a_panic_in_a_mask_ends_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As pyo3 raises it."""

    engine = new_engine(folder)
    undisturbed = engine.generate([constrained("good", NUMBERS)])[0]
    fill, fill_one, guilty = matcher_masks.fill_next_token_bitmask_par, matcher_masks.fill_next_token_bitmask, []

    def panics(executor: Any, rows: list[Any], masks: Any) -> None:
        if any(matcher in guilty for matcher, _ in rows):
            raise Panic("index out of bounds")
        fill(executor, rows, masks)

    def panics_alone(matcher: Any, mask: Any) -> None:
        if matcher in guilty:
            raise Panic("index out of bounds")
        fill_one(matcher, mask)

    monkeypatch.setattr(matcher_masks, "fill_next_token_bitmask_par", panics)
    monkeypatch.setattr(matcher_masks, "fill_next_token_bitmask", panics_alone)
    core = engine.core
    for name, grammar in (("good", NUMBERS), ("bad", schema_grammar(SCHEMA))):
        core.add_request(constrained(name, grammar))
    ids: list[int] = []
    errors: dict[str, str | None] = {}
    while core.has_work():
        for delta in core.step():
            if delta.request_id == "good":
                ids += delta.token_ids
            if delta.finish_reason is FinishReason.ERROR:
                errors[delta.request_id] = delta.error
        bad = next((r for r in core.scheduler.running if r.request_id == "bad"), None)
        if bad is not None and bad.constraint is not None:
            guilty.append(bad.constraint.matcher)
    assert ids == undisturbed
    assert list(errors) == ["bad"], "the other request goes on"
    assert "too complex" in (errors["bad"] or "")
