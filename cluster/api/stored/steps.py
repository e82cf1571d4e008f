"""From what a delta adds to a sequence's output to a step, as responses are stored and shown. Knows both forms; no store and no replica."""

from collections.abc import Sequence

from cluster.api.context import ApiContext
from cluster.api.generation.logprobs import render_chat
from cluster.api.schemas.chat import ChatTokenLogprob, TopLogprob
from cluster.responses.items import TextLogprob, TextTopLogprob
from cluster.responses.records import CallPiece, Step
from cluster.text.output.output_text import OutputStep, PlacedLogprob


def to_step(
    api: ApiContext, step: OutputStep, *, token_ids: list[int], num_cached_tokens: int | None, shows_logprobs: bool
) -> Step:
    """num_cached_tokens: only for a response's first step."""
    return Step(
        token_ids=token_ids,
        text=step.text,
        finish_reason=None if step.finish_reason is None else step.finish_reason.value,
        calls=[CallPiece(c.index, c.arguments, c.id, c.name) for c in step.tool_calls],
        num_cached_tokens=num_cached_tokens,
        logprobs=_render(api, step.logprobs) if shows_logprobs else [],
    )


def _render(api: ApiContext, placed: Sequence[PlacedLogprob]) -> list[TextLogprob]:
    def top(one: TopLogprob | ChatTokenLogprob) -> TextTopLogprob:
        return TextTopLogprob(token=one.token, logprob=one.logprob, bytes=one.bytes or [])

    return [
        TextLogprob(
            token=one.token,
            logprob=one.logprob,
            bytes=one.bytes or [],
            top_logprobs=[top(other) for other in one.top_logprobs],
        )
        for one in render_chat(api.tokenizer, placed).content
    ]
