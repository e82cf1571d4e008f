"""A launched step: which requests take part, and their next tokens until the host has read them.

Knows requests and sampled tokens; no scheduler, no blocks, no device. With overlap, one step is in flight while the next one is
scheduled and launched, so a request has at most one token that the host does not know.

What keeps this safe: the device computes steps in the order in which they are launched. So a block may go to another request as soon as
the last step that uses it is launched, and a row that was launched for nothing, because the token before it ended its request, writes
into a block that nobody reads before it is written again.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import torch

from workers.engine.scheduling.request import Request, ScheduledRequest
from workers.kv_cache.manager import KVCacheManager
from workers.sampling.grammar import Grammars
from workers.sampling.masks import StepMasks
from workers.sampling.pending import reads_history
from workers.sampling.sampler import Sampled

# By request id, see Grammars.begin_masks.
Masks = Mapping[str, np.ndarray]


@dataclass(slots=True)
class NextTokens:
    """The next tokens of some requests, a row each. `read` waits until the device has computed them: at least one a row.

    `token_ids`: [len(requests)] int64 on the device, where the next step may take them without a read; None if the host has them already.
    """

    requests: Sequence[Request]
    read: Callable[[], Sequence[Sequence[Sampled]]]
    token_ids: torch.Tensor | None = None


@dataclass(slots=True)
class LaunchedStep:
    """One step from its launch until `read`.

    `shows_speed`: whether its seconds show how fast prompts are computed. `tokens` is there once they are sampled.
    """

    scheduled: Sequence[ScheduledRequest]
    shows_speed: bool
    # In the order of the batch: whose newest token the step computes, and those of them that get a next one.
    completing: Sequence[Request] = field(init=False)
    sampling: Sequence[Request] = field(init=False)
    # Of grammars, on their way.
    masks: StepMasks | None = None
    # Requests, by id, whose mask was not there in time: their newest token is computed again in a later step.
    late: Set[str] = frozenset()
    tokens: NextTokens | None = None

    def __post_init__(self) -> None:
        self.completing = [s.request for s in self.scheduled if s.completes]
        self.sampling = [s.request for s in self.scheduled if s.samples]

    @property
    def num_tokens(self) -> int:
        """How many tokens it computes."""
        return sum(s.num_new_tokens for s in self.scheduled)

    @property
    def num_leaving(self) -> int:
        """How many requests have left the scheduler and wait for their last token. May be called from any thread."""
        return sum(r.has_left for r in self.completing)

    @property
    def token_ids(self) -> torch.Tensor | None:
        """See NextTokens."""
        return None if self.tokens is None else self.tokens.token_ids

    @property
    def needs_known_tokens(self) -> bool:
        """Whether the host must know all earlier tokens before the next ones are sampled: a grammar's mask follows from them."""
        return any(
            r.constraint is not None or (r.unread_row is not None and reads_history(r.sampling)) for r in self.sampling
        )

    def begin_masks(self, grammars: Grammars) -> None:
        """Starts to compute the masks for the next tokens, on other threads. All earlier tokens must be known."""
        constraints = {
            r.request_id: r.constraint for r in self.sampling if r.constraint is not None and not r.has_ended
        }
        self.masks = grammars.begin_masks(constraints)

    def take_masks(self, synchronize: Callable[[], None]) -> Masks:
        """Call it when the logits are begun. Some of the requests are `late` from now on. synchronize: waits until they are computed."""
        if self.masks is None:
            return {}
        if not self.masks.are_there:
            synchronize()  # `take` measures the forward pass
        masks, self.late = self.masks.take()
        return masks

    def rows_to_sample(self) -> list[int]:
        """The rows of the logits, one for each of `sampling`, whose request is still there and has its mask."""
        late = self.late
        return [i for i, r in enumerate(self.sampling) if not r.has_ended and not (late and r.request_id in late)]

    def commit(self, kv_cache: KVCacheManager) -> list[Request]:
        """The step counts as computed from now on, and its next tokens are in flight. All tokens that it computes must be known.

        Returns the requests that end with the token in flight, or with their prompt: they compute nothing any more.
        """
        assert self.tokens is not None, "a step is sampled before it counts"
        late = self.late
        for s in self.scheduled:
            request = s.request
            if not request.has_ended:
                is_late = bool(late) and request.request_id in late
                kv_cache.commit(request.sequence, s.num_new_tokens - is_late)
        for row, request in enumerate(self.tokens.requests):
            request.unread_row = row
        # Hardly any passes the first test, which costs least.
        near = [r for r in self.completing if len(r.sequence.token_ids) + 1 >= r.max_num_tokens]
        return [r for r in self._arrived(near) if r.is_at_limit()] if near else near

    def read(self) -> list[tuple[Request, Sequence[Sampled]]]:
        """The requests whose newest token the step has computed, in its order, with their next tokens: none for one that only reads its
        prompt. Waits until the device has computed the step.
        """
        assert self.tokens is not None, "a step is sampled before it is read"
        rows, here = self.tokens.read(), self._arrived(self.completing)
        for request in here:
            request.unread_row = None
        if here == self.tokens.requests:  # the usual step
            return list(zip(here, rows, strict=True))
        sampled = {request.request_id: row for request, row in zip(self.tokens.requests, rows, strict=True)}
        return [(request, sampled.get(request.request_id, ())) for request in here]

    def _arrived(self, completing: Sequence[Request]) -> list[Request]:
        """Those that have their newest token. Others were aborted in the meantime, or an earlier token ended them and this one was launched
        for nothing.
        """
        late = self.late
        return [r for r in completing if not r.has_ended and not (late and r.request_id in late)]
