"""What a stream's reader may leave unread, with times passed in."""

import asyncio

import pytest

from cluster.replicas.inbox import LAG_PATIENCE_S, MAX_LAG_BYTES, StreamInbox
from workers.errors import ReplicaUnavailableError, RequestError
from workers.protocol import TokenDelta, TokenLogprob

SMALL = TokenDelta(request_id="r", token_ids=[1])
# About a quarter of what may wait.
LARGE = TokenDelta(
    request_id="r",
    token_ids=[1],
    logprobs=[TokenLogprob(token_id=1, logprob=-1.0, rank=1, top=[(i, -1.0) for i in range(MAX_LAG_BYTES // 400)])],
)


async def test_deltas_come_in_order_and_then_the_error():
    inbox = StreamInbox()
    deltas = [TokenDelta(request_id="r", token_ids=[i]) for i in range(3)]
    assert all(inbox.put(delta, 0.0) for delta in deltas)
    inbox.end(ReplicaUnavailableError("It is lost."))
    assert [await inbox.get() for _ in deltas] == deltas
    with pytest.raises(ReplicaUnavailableError, match="It is lost"):
        await inbox.get()


async def test_a_reader_that_lags_for_too_long_gets_the_error_and_nothing_is_kept():
    inbox = StreamInbox()
    for _ in range(8):
        assert inbox.put(LARGE, 10.0), "a burst is not the reader's fault"
    assert inbox.put(SMALL, 10.0 + LAG_PATIENCE_S)
    assert not inbox.put(SMALL, 10.1 + LAG_PATIENCE_S)
    assert len(inbox) == 1, "only the error waits"
    with pytest.raises(RequestError, match="Read faster") as error:
        await inbox.get()
    assert error.value.code == "slow_reader"


async def test_a_canceled_reader_takes_nothing():
    inbox = StreamInbox()
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    # The delta has woken the reader when it is canceled.
    inbox.put(SMALL, 0.0)
    reader.cancel()
    assert (await asyncio.gather(reader, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    inbox.end(ReplicaUnavailableError("It is lost."))
    assert await inbox.get() == SMALL
    assert len(inbox) == 1


async def test_who_takes_deltas_is_asked_while_the_reader_waits_and_never_out_of_order():
    taken: list[TokenDelta] = []
    wanted = [True]

    def take(delta: TokenDelta) -> bool:
        if wanted[0]:
            taken.append(delta)
        return wanted[0]

    first, second, third, fourth = (TokenDelta(request_id="r", token_ids=[i]) for i in range(4))
    inbox = StreamInbox(take)
    inbox.put(first, 0.0)
    assert await inbox.get() == first, "nobody waited for it"
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(second, 0.0)
    assert taken == [second]
    wanted[0] = False
    inbox.put(third, 0.0)
    wanted[0] = True
    inbox.put(fourth, 0.0)
    assert taken == [second], "the third delta waits, and the fourth must not pass it"
    assert [await reader, await inbox.get()] == [third, fourth]


async def test_the_reader_gets_what_taking_raises():
    def take(delta: TokenDelta) -> bool:
        raise ValueError("It cannot be encoded.")

    inbox = StreamInbox(take)
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(SMALL, 0.0)
    with pytest.raises(ValueError, match="cannot be encoded"):
        await reader


async def test_a_reader_that_catches_up_is_forgiven():
    inbox = StreamInbox()
    for _ in range(8):
        inbox.put(LARGE, 10.0)
    for _ in range(6):
        await inbox.get()
    assert inbox.put(LARGE, 20.0)


def test_one_delta_may_be_larger_than_everything_else_together():
    inbox = StreamInbox()
    huge = TokenDelta(request_id="r", prompt_logprobs=[LARGE.logprobs[0]] * 10)
    assert inbox.put(huge, 0.0)
    assert len(inbox) == 1
