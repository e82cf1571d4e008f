"""What sampled tokens make of a request: appended one by one until one of them ends it, and reported as deltas.

Changes the request only. Knows no scheduler and no blocks: the caller removes a request that has ended.
"""

from collections.abc import Sequence

from workers.engine.outputs.prompt_outputs import MeanEmbedding, PromptLogprobs
from workers.engine.scheduling.request import Request
from workers.protocol import FinishReason, TokenDelta
from workers.sampling.sampler import Sampled


def advance_plainly(request: Request, sampled: Sequence[Sampled], eos_token_ids: tuple[int, ...]) -> TokenDelta | None:
    """`advance` for a request that goes on with one token and has nothing else to report, which most do in most steps. None, without
    effect, for any other.
    """
    if len(sampled) != 1 or request.num_cached_tokens is not None or request.constraint is not None:
        return None
    (token_id, logprob), token_ids = sampled[0], request.sequence.token_ids
    if (
        token_id is None
        or logprob is not None
        or token_id in eos_token_ids
        or token_id in request.sampling.stop_token_ids
    ):
        return None
    if len(token_ids) + 1 >= request.max_num_tokens or request.prompt_output is not None:
        return None
    token_ids.append(token_id)
    return TokenDelta(request_id=request.request_id, token_ids=[token_id])


def advance(request: Request, sampled: Sequence[Sampled], eos_token_ids: tuple[int, ...]) -> list[TokenDelta]:
    """Adds one step's tokens to a request. The last of the deltas says whether it ended; tokens after its end are dropped.

    `sampled` is empty for a request that samples nothing and only reads its prompt. Usually there is one delta; a failure after other
    tokens of the step is a delta of its own, as if each token had a step of its own.
    """
    token_ids, logprobs = [], []
    reason, error = None, None
    if not sampled:
        reason = request.finish_reason(eos_token_ids)
    for chosen in sampled:
        error = _append(request, chosen)
        if error is not None or chosen.token_id is None:
            break
        token_ids.append(chosen.token_id)
        if chosen.logprob is not None:
            logprobs.append(chosen.logprob)
        reason = request.finish_reason(eos_token_ids)
        if reason is not None:
            break
    deltas = []
    if token_ids or error is None:
        num_cached_tokens, request.num_cached_tokens = request.num_cached_tokens, None
        output, request.prompt_output = request.prompt_output, None
        deltas.append(
            TokenDelta(
                request_id=request.request_id,
                token_ids=token_ids,
                logprobs=logprobs or None,
                finish_reason=reason,
                stop_token_id=token_ids[-1] if reason is FinishReason.STOP and request.stops(eos_token_ids) else None,
                num_cached_tokens=num_cached_tokens,
                prompt_logprobs=output.logprobs if isinstance(output, PromptLogprobs) else None,
                embedding=output.to_bytes() if isinstance(output, MeanEmbedding) else None,
            )
        )
    if error is not None:
        deltas.append(failure(request.request_id, error))
    return deltas


def failure(request_id: str, error: str, *, elsewhere: bool = False) -> TokenDelta:
    """Ends a request, for a reason of its own, which every replica would have, or `elsewhere`: another one may go on. `error` is for the
    user.
    """
    return TokenDelta(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error=error,
        refused=not elsewhere,
        elsewhere=elsewhere,
    )


def _append(request: Request, chosen: Sampled) -> str | None:
    """Appends the token. Returns a message for the user if the request cannot go on."""
    if chosen.token_id is not None:
        request.append(chosen.token_id)
    if request.constraint is not None and request.constraint.error is not None:
        return request.constraint.error
    if chosen.token_id is None:
        return "Every token is banned here. Allow more tokens, or ban fewer."
    return None
