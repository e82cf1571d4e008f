"""A Replica without an engine: says what it was told to say, and remembers what it was asked and what was closed on it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from workers.errors import ReplicaUnavailableError
from workers.protocol import EngineFacts, FinishReason, GenerateRequest, LoadReport, TokenDelta, TokenLogprob

Script = Callable[[GenerateRequest], Sequence[TokenDelta | Exception]]


def tokens(
    token_ids: Sequence[int], *, finish: FinishReason = FinishReason.LENGTH, stop_token_id: int | None = None
) -> Script:
    """One delta per token. With stop_token_id, that token is added at the end and finish_reason is STOP."""

    def script(request: GenerateRequest) -> list[TokenDelta]:
        ids = [*token_ids] if stop_token_id is None else [*token_ids, stop_token_id]
        count = request.sampling.logprobs
        deltas = []
        for i, token_id in enumerate(ids):
            last = i == len(ids) - 1
            top = [(token_id, -0.5), *((other, -1.0 - other) for other in range(5, 5 + (count or 0)))][: count or 0]
            deltas.append(
                TokenDelta(
                    request_id=request.request_id,
                    token_ids=[token_id],
                    logprobs=None
                    if count is None
                    else [TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=top)],
                    finish_reason=(FinishReason.STOP if stop_token_id is not None else finish) if last else None,
                    stop_token_id=stop_token_id if last else None,
                    num_cached_tokens=1 if i == 0 else None,
                )
            )
        return deltas

    return script


class FakeReplica:
    """Plays `script`. With `hold_after` n, streams stop after n deltas until `release` is set."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        replica_id: str = "fake-0",
        vocab_size: int = 4096,
        max_model_len: int = 256,
        hold_after: int | None = None,
        reason: str | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.script = script or tokens([42, 43])
        self.hold_after = hold_after
        self.release = asyncio.Event()
        self.holding = asyncio.Event()
        self.reason = reason
        self.load = LoadReport(num_blocks=100, num_used_blocks=25, num_running=1, forward_age_s=0.1)
        self.facts = EngineFacts(
            replica_id=replica_id,
            tensor_parallel_size=1,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=8,
            block_size=16,
            num_blocks=100,
            sliding_window=None,
            enable_prefix_caching=True,
            bos_token_id=1,
            eos_token_ids=(2,),
            attention_backend="fake",
        )
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self.aborted: list[str] = []
        self.closed = asyncio.Event()  # set when a stream was closed before its end

    def is_ready(self, now: float) -> bool:
        return self.reason is None

    def not_ready_reason(self, now: float) -> str | None:
        return self.reason

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        self.num_open += 1
        ended = False
        try:
            for i, delta in enumerate(self.script(request)):
                if i == self.hold_after:
                    self.holding.set()
                    await self.release.wait()
                await asyncio.sleep(0)
                if isinstance(delta, Exception):
                    ended = True
                    raise delta
                ended = delta.finish_reason is not None
                yield delta
                if ended:
                    return
            ended = True
            raise ReplicaUnavailableError(f"Replica {self.replica_id} is gone.")
        finally:
            self.num_open -= 1
            if not ended:
                self.aborted.append(request.request_id)
                self.closed.set()
