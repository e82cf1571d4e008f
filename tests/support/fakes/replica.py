"""A Replica without an engine: streams what its script says, and remembers its requests and which streams were closed early.

Continues after `output_token_ids` as an engine does. Can be lost, drained, slow and full, and reports load and cache in frames.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from workers.errors import ReplicaUnavailableError
from workers.protocol import (
    CacheEvents,
    EngineFacts,
    FinishReason,
    GenerateRequest,
    LoadReport,
    StepFrame,
    TokenDelta,
    TokenLogprob,
)

Script = Callable[[GenerateRequest], Sequence[TokenDelta | Exception]]


def tokens(
    token_ids: Sequence[int], *, finish: FinishReason = FinishReason.LENGTH, stop_token_id: int | None = None
) -> Script:
    """One delta per token. With stop_token_id, that token is added at the end and finish_reason is STOP.

    A resumed request gets the deltas after its `output_token_ids`, the first of them with a count of cached tokens again.
    """

    def script(request: GenerateRequest) -> list[TokenDelta]:
        ids = [*token_ids] if stop_token_id is None else [*token_ids, stop_token_id]
        done = len(request.output_token_ids)
        assert request.output_token_ids == ids[:done], "resumed after tokens that were never sent"
        count = request.sampling.logprobs
        deltas = []
        for i, token_id in list(enumerate(ids))[done:]:
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
                    num_cached_tokens=1 + done if i == done else None,
                )
            )
        return deltas

    return script


class FakeReplica:
    """Plays `script`. With `hold_after` n, streams stop after n deltas until `release` is set.

    lose_after: the replica is lost when a stream has sent that many deltas. A script that ends without a finish_reason loses it too.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        replica_id: str = "fake-0",
        vocab_size: int = 4096,
        max_model_len: int = 256,
        max_num_seqs: int = 8,
        block_size: int = 16,
        hold_after: int | None = None,
        lose_after: int | None = None,
        reason: str | None = None,
        numerics: str = "",
    ) -> None:
        self.replica_id = replica_id
        self.script = script or tokens([42, 43])
        self.hold_after = hold_after
        self.lose_after = lose_after
        self.release = asyncio.Event()
        self.holding = asyncio.Event()
        self.reason = reason
        self.condemned: str | None = None
        self.crashes = True  # else it is cut off, freezes or is stopped
        self.drain_until: float | None = None
        self.is_leaving = False
        self.on_frame: Callable[[StepFrame], None] | None = None
        self.load = LoadReport(num_blocks=100, num_used_blocks=25, num_running=1, forward_age_s=0.1)
        self.facts = EngineFacts(
            replica_id=replica_id,
            tensor_parallel_size=1,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            block_size=block_size,
            num_blocks=100,
            sliding_window=None,
            enable_prefix_caching=True,
            bos_token_id=1,
            eos_token_ids=(2,),
            attention_backend="fake",
            numerics=numerics,
        )
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self.aborted: list[str] = []
        self.closed = asyncio.Event()  # set when a stream was closed before its end

    def is_ready(self, now: float) -> bool:
        return self.not_ready_reason(now) is None

    def not_ready_reason(self, now: float) -> str | None:
        return self.condemned or self.reason

    def unhealthy_reason(self, now: float) -> str | None:
        return self.not_ready_reason(now)

    def lose(self, reason: str | None = None) -> None:
        """Ends every open stream with the reason."""
        self.condemned = reason or f"Replica {self.replica_id} is lost."
        self.release.set()

    def say(self, cache: CacheEvents | None = None, **load: Any) -> None:
        """A frame, as a replica sends them a few times a second."""
        self.load = msgspec.structs.replace(self.load, **load)
        if self.on_frame is not None:
            self.on_frame(StepFrame(deltas=[], load=self.load, cache=cache))

    async def generate(
        self, request: GenerateRequest, *, take: Callable[[TokenDelta], bool] | None = None
    ) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        self.num_open += 1
        ended = False
        try:
            for i, delta in enumerate(self.script(request)):
                if i == self.hold_after:
                    self.holding.set()
                    await self.release.wait()
                await asyncio.sleep(0)
                if i == self.lose_after:
                    self.lose()
                if self.condemned:
                    break
                if isinstance(delta, Exception):
                    ended = True
                    raise delta
                ended = delta.finish_reason is not None
                if take is None or not take(delta):
                    yield delta
                if ended:
                    return
            ended = True
            self.lose(self.condemned)
            raise ReplicaUnavailableError(self.condemned or "", crashed=self.crashes)
        finally:
            self.num_open -= 1
            if not ended:
                self.aborted.append(request.request_id)
                self.closed.set()
