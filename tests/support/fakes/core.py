"""An engine core without a model, for everything above the engine: token i of a request is (seed + i) % VOCAB_SIZE.

The log-probability of token t is -t / VOCAB_SIZE, an embedding holds 1.0, 2.0, 3.0 and 4.0; grammars mean nothing here.
A test can hold back a step, make it fail, and read which requests the core still has. Implements workers/engine/loop.py `Core`.
"""

import struct
import threading
import time
from collections import deque

from workers.errors import RequestError
from workers.protocol import (
    CacheEvents,
    EngineFacts,
    FinishReason,
    GenerateRequest,
    LoadReport,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)

VOCAB_SIZE = 1000
FACTS = EngineFacts(
    replica_id="r0",
    tensor_parallel_size=2,
    vocab_size=VOCAB_SIZE,
    max_model_len=512,
    max_num_seqs=64,
    block_size=16,
    num_blocks=100,
    sliding_window=None,
    enable_prefix_caching=True,
    bos_token_id=1,
    eos_token_ids=(2,),
    attention_backend="fake",
    hidden_size=4,
)


def request(request_id: str, *, max_tokens: int = 5, seed: int = 100) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    return GenerateRequest(request_id=request_id, prompt_token_ids=[1, 5, 6], sampling=sampling)


def expected_tokens(req: GenerateRequest) -> list[int]:
    return [(req.sampling.seed + i) % VOCAB_SIZE for i in range(req.sampling.max_tokens)]


def _logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-token_id / VOCAB_SIZE, rank=token_id + 1)


def _prompt_logprobs(req: GenerateRequest) -> list[TokenLogprob | None] | None:
    if req.sampling.prompt_logprobs is None:
        return None
    start = req.sampling.prompt_logprobs_start
    return [_logprob(t) if i else None for i, t in enumerate(req.prompt_token_ids[start:], start=start)]


class FakeCore:
    """`requests` maps each id to the request and its tokens generated so far. Clear `gate` to hold back steps and heartbeats. Each
    entry of `cache_events` goes out with one of the next steps.
    """

    def __init__(self) -> None:
        self.requests: dict[str, tuple[GenerateRequest, int]] = {}
        self.aborted: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_with: Exception | None = None
        self.cache_events: deque[CacheEvents] = deque()
        self.num_heartbeats = 0
        self.num_steps = 0
        self.shut_down = threading.Event()
        self.last_forward: float | None = None
        self.waiting_for: tuple[int, ...] = ()
        self.step_age_s: float | None = None

    def add_request(self, request: GenerateRequest) -> None:
        if not request.prompt_token_ids:
            raise RequestError("The prompt is empty.", param="prompt")
        if request.sampling.seed == 666:
            raise ZeroDivisionError("a bug in add_request")
        self.requests[request.request_id] = (request, len(request.output_token_ids))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.requests.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[TokenDelta]:
        self._forward()
        self.num_steps += 1
        deltas = []
        for request_id, (req, done) in list(self.requests.items()):
            samples = req.sampling.max_tokens > 0
            token_ids = [(req.sampling.seed + done) % VOCAB_SIZE] if samples else []
            finished = done + len(token_ids) == req.sampling.max_tokens
            self.requests[request_id] = (req, done + 1)
            if finished:
                del self.requests[request_id]
            deltas.append(
                TokenDelta(
                    request_id=request_id,
                    token_ids=token_ids,
                    logprobs=None if req.sampling.logprobs is None else [_logprob(t) for t in token_ids],
                    finish_reason=FinishReason.LENGTH if finished else None,
                    prompt_logprobs=None if done else _prompt_logprobs(req),
                    embedding=struct.pack("<4f", 1.0, 2.0, 3.0, 4.0) if req.embed else None,
                )
            )
        return deltas

    def take_cache_events(self) -> CacheEvents | None:
        return self.cache_events.popleft() if self.cache_events else None

    def heartbeat(self) -> None:
        self._forward()
        self.num_heartbeats += 1

    def _forward(self) -> None:
        assert self.gate.wait(30.0), "the test left the gate closed"
        if self.fail_with is not None:
            raise self.fail_with
        self.last_forward = time.monotonic()

    def load(self) -> LoadReport:
        age = None if self.last_forward is None else time.monotonic() - self.last_forward
        return LoadReport(
            num_running=len(self.requests),
            num_steps_total=self.num_steps,
            step_age_s=self.step_age_s,
            forward_age_s=age,
            stuck_ranks=self.waiting_for,
        )

    def facts(self, replica_id: str) -> EngineFacts:
        return FACTS

    def shutdown(self) -> None:
        self.shut_down.set()
