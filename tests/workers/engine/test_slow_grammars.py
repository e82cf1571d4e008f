"""Next to grammars whose masks take long: who is part of which step, what a step waits for, and who ends. No test burns CPU time: the
clocks are fakes, and a slow mask is one that a test holds back.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ALL_COMPLETED, Future, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_engine
from support.paths import DEMO_MODEL

from workers.engine.core import EngineCore
from workers.engine.llm_engine import LLMEngine, run_requests
from workers.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta
from workers.sampling import grammar as grammar_module
from workers.sampling import masks as masks_module
from workers.sampling import matcher_masks
from workers.sampling.grammar import MAX_MASKS_S, MAX_REPLAY_S, Constraint
from workers.sampling.masks import MIN_WAIT_S, SLOW_MASK_S
from workers.sampling.matcher_masks import MatcherMasks
from workers.sampling.vocabulary import load_grammar_tokenizer

TOKENIZER = DEMO_MODEL / "tokenizer.model.v3"
SP = SentencePieceProcessor(model_file=str(TOKENIZER))
NUMBERS = '%llguidance {"no_forcing": true}\nstart: /[0-9]{2,4}(-[a-f]{3}){4,6}/'


@pytest.fixture(scope="module", params=[False, True], ids=["one by one", "overlap"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=SP.vocab_size())
    settings = {"tokenizer_path": str(TOKENIZER), "num_kv_blocks": 1000, "max_model_len": 1024}
    return make_engine(folder, **settings, overlap=request.param)


@pytest.fixture
def may_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no mask is computed but the first of each request."""
    event, fill = threading.Event(), matcher_masks.fill_next_token_bitmask_par

    def held_back(*args: Any) -> None:
        assert event.wait(20)
        fill(*args)

    monkeypatch.setattr(matcher_masks, "fill_next_token_bitmask_par", held_back)
    yield event
    event.set()


def request(name: str, grammar: str | None, **params: Any) -> GenerateRequest:
    sampling = SamplingParams(**({"max_tokens": 500, "seed": 1, "grammar": grammar} | params))
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 300, 400], sampling=sampling)


def drain(core: EngineCore) -> dict[str, list[TokenDelta]]:
    found: dict[str, list[TokenDelta]] = {}
    while core.has_work():
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta)
    return found


@pytest.mark.parametrize("slow_mask_s", [SLOW_MASK_S, -1.0], ids=["not known to be slow", "known to be slow"])
def test_a_plain_request_is_part_of_every_step(
    slow_mask_s: float, engine: LLMEngine, may_end: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three neighbours wait for masks that do not come. In each step the plain request gets a token, and a step waits for a mask at most
    once a neighbour, and not longer than its patience: afterwards the neighbour is held.
    """
    core, names = engine.core, ["a", "b", "c"]
    neighbours = [request(name, NUMBERS, seed=i) for i, name in enumerate(names)]
    may_end.set()
    expected = dict(zip(names, run_requests(core, neighbours), strict=True))
    may_end.clear()
    waits: list[float] = []

    def counted(futures: list[Future[np.ndarray]], timeout_s: float, return_when: str = ALL_COMPLETED) -> Any:
        if all(future.done() for future in futures):
            return wait(futures, 0)
        waits.append(timeout_s)
        return wait(futures, 0, return_when)

    monkeypatch.setattr(masks_module, "wait", counted)
    monkeypatch.setattr(masks_module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(masks_module, "SLOW_MASK_S", slow_mask_s)
    for one in (*neighbours, request("plain", None, ignore_eos=True)):
        core.add_request(one)
    found: dict[str, list[int]] = {name: [] for name in (*names, "plain")}
    num_steps = num_steps_without_neighbours = 0
    while num_steps_without_neighbours < 10:
        deltas = core.step()
        num_steps += 1
        for delta in deltas:
            found[delta.request_id] += delta.token_ids
        num_in_flight = 1 if core.overlap else 0
        assert len(found["plain"]) == num_steps - num_in_flight, "the plain request gets a token in every step"
        all_held = sum(r.is_held for r in core.scheduler.running) == len(names)
        num_steps_without_neighbours += all_held
    assert len(waits) <= len(names)
    assert all(timeout_s <= MIN_WAIT_S for timeout_s in waits), "no step waits longer"
    may_end.set()
    monkeypatch.setattr(masks_module, "wait", wait)
    for name, rest in drain(core).items():
        found[name] += [token_id for delta in rest for token_id in delta.token_ids]
    assert {name: found[name] for name in names} == expected, "late masks change no token"


def test_a_request_over_its_budget_for_masks_ends_alone(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mask takes 4 s of fake CPU time. The first is part of compiling; the third of the others exceeds 10 s."""
    core, alone = engine.core, MatcherMasks.alone
    plain = request("plain", None, max_tokens=20, ignore_eos=True)
    expected = run_requests(core, [plain])[0]
    monkeypatch.setattr(masks_module, "SLOW_MASK_S", -1.0)
    monkeypatch.setattr(MatcherMasks, "alone", lambda self, constraint: (alone(self, constraint)[0], 4.0))
    core.add_request(request("expensive", NUMBERS))
    core.add_request(plain)
    found = drain(core)
    last = found["expensive"][-1]
    assert (last.finish_reason, last.refused) == (FinishReason.ERROR, True)
    assert f"more than {MAX_MASKS_S:g} s of CPU time. Make it simpler" in (last.error or "")
    assert sum(len(delta.token_ids) for delta in found["expensive"]) in (3, 4)
    assert [token_id for delta in found["plain"] for token_id in delta.token_ids] == expected


def test_an_output_that_takes_too_long_to_follow_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from another replica. The fake clock says that each token took 2 s of CPU time."""
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(grammar_module, "time", SimpleNamespace(thread_time=lambda: next(now)))
    tokenizer = load_grammar_tokenizer(TOKENIZER, vocab_size=SP.vocab_size(), eos_token_ids=(2,))
    text = tokenizer.tokenize_str("1234-abc-def-abc")
    constraint = Constraint(tokenizer, NUMBERS, text)
    assert f"more than {MAX_REPLAY_S:g} s of CPU time" in (constraint.error or "")
    assert next(now) == 8, "it ends with the first token beyond the budget"
