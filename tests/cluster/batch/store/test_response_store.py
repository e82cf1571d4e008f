"""The store of responses, in SQLite and PostgreSQL: leases and their fences, steps, ends, and what is deleted."""

import msgspec
import pytest

from cluster.responses.items import Asked
from cluster.responses.records import (
    Append,
    ResponseRecord,
    Step,
    Stored,
    StoredRequest,
    encode_steps,
)
from cluster.text.output.options import OutputOptions
from workers.errors import RequestError
from workers.protocol import GenerateRequest, SamplingParams

NEVER = lambda owner: False  # noqa: E731


def a_response(name: str = "resp_1", *, previous: str | None = None, expires_at: int = 1000, owner: str = "") -> Stored:
    return Stored(
        record=ResponseRecord(
            id=name,
            owner=owner,
            status="in_progress",
            created_at=1,
            expires_at=expires_at,
            previous_response_id=previous,
        ),
        request=StoredRequest(
            asked=Asked(model="m", metadata={"k": "ä"}),
            items=[{"id": "in_1", "type": "message", "role": "user", "content": []}],
            generate=GenerateRequest(
                request_id=name,
                prompt_token_ids=[1, 5, 6],
                sampling=SamplingParams(max_tokens=9, seed=2**62 + 1, grammar="g"),
                adapter="a@1",
            ),
            output=OutputOptions(continues=[4], stop=("x",), tool_calls_token_id=7),
        ),
    )


def steps(*numbers: int) -> list[Step]:
    return [Step([number], f"t{number}") for number in numbers]


def append(lease, number: int, *token_ids: int, record: ResponseRecord | None = None) -> Append:
    return Append(lease=lease, number=number, data=encode_steps(steps(*token_ids)) if token_ids else b"", record=record)


async def test_what_is_stored_comes_back(store):
    responses = store.responses
    stored = a_response()
    lease = await responses.add(stored, owner="me", ttl_s=9, now=1)
    assert await responses.get("resp_1") == stored
    assert await responses.get("resp_2") is None
    assert await responses.append([append(lease, 0, 10, 11), append(lease, 2, 12)][:1]) == set()
    assert await responses.append([append(lease, 2, 12)]) == set()
    for after in range(4):
        record, found = await responses.follow("resp_1", after=after)
        assert (record, found) == (stored.record, steps(10, 11, 12)[after:])
    assert await responses.follow("resp_2", after=0) is None


async def test_the_adapters_of_responses_that_have_not_ended(store):
    responses = store.responses
    assert await responses.adapters() == set()
    lease = await responses.add(a_response(), owner="me", ttl_s=9, now=1)
    await responses.add(a_response("resp_2"), owner=None, ttl_s=9, now=1)
    assert await responses.adapters() == {"a@1"}
    await responses.delete("resp_2")
    ended = msgspec.structs.replace(a_response().record, status="completed")
    assert await responses.adapters() == {"a@1"}
    await responses.append([append(lease, 0, record=ended)])
    assert await responses.adapters() == set()


async def test_a_lease_is_taken_over_and_the_first_runner_stores_nothing_more(store):
    responses = store.responses
    first = await responses.add(a_response(), owner="me", ttl_s=1000, now=1)
    await responses.append([append(first, 0, 10)])
    assert await responses.acquire("you", ttl_s=9, now=2, most=5, is_dead=NEVER) == []
    [(second, stored, found)] = await responses.acquire("you", ttl_s=1000, now=2, most=5, is_dead=lambda o: o == "me")
    assert (second.fence, stored, found) == (first.fence + 1, a_response(), steps(10))
    assert await responses.append([append(first, 1, 11), append(second, 1, 12)][:1]) == {"resp_1"}
    assert await responses.append([append(second, 1, 12)]) == set()
    assert await responses.renew([first], ttl_s=9, now=3) == {"resp_1"}
    assert await responses.renew([second], ttl_s=9, now=3) == set()
    await responses.release(first)
    assert await responses.acquire("he", ttl_s=9, now=3, most=5, is_dead=NEVER) == []
    await responses.release(second)
    [(third, _, found)] = await responses.acquire("he", ttl_s=9, now=3, most=5, is_dead=NEVER)
    assert found == steps(10, 12) and third.fence == 3


async def test_as_many_are_taken_as_wanted_oldest_first(store):
    responses = store.responses
    for i in range(4):
        assert await responses.add(a_response(f"resp_{i}"), owner=None, ttl_s=9, now=1) is None
    taken = await responses.acquire("me", ttl_s=1000, now=1, most=3, is_dead=NEVER)
    assert [lease.response_id for lease, _, _ in taken] == ["resp_0", "resp_1", "resp_2"]


async def test_an_ended_response_has_no_runner(store):
    responses = store.responses
    lease = await responses.add(a_response(), owner="me", ttl_s=9, now=1)
    record = ResponseRecord(id="resp_1", owner="", status="completed", created_at=1, expires_at=1000, completed_at=7)
    assert await responses.append([append(lease, 0, 10, record=record)]) == set()
    assert (await responses.get("resp_1")).record == record
    assert await responses.acquire("you", ttl_s=9, now=99999, most=5, is_dead=lambda o: True) == []


async def test_whoever_ends_it_takes_the_lease(store):
    responses = store.responses
    lease = await responses.add(a_response(), owner="me", ttl_s=9, now=1)
    await responses.append([append(lease, 0, 10, 11)])
    seen = []

    def cancelled(stored: Stored, found: list[Step]) -> ResponseRecord:
        seen.append(found)
        return ResponseRecord(id="resp_1", owner="", status="cancelled", created_at=1, expires_at=1000)

    assert (await responses.end("resp_1", cancelled)).status == "cancelled"
    assert seen == [steps(10, 11)]
    assert await responses.append([append(lease, 2, 12)]) == {"resp_1"}
    assert (await responses.end("resp_1", cancelled)).status == "cancelled" and len(seen) == 1
    assert await responses.end("resp_9", cancelled) is None


async def test_deleted_and_expired_responses_leave_nothing(store):
    responses = store.responses
    lease = await responses.add(a_response(expires_at=50), owner="me", ttl_s=9, now=1)
    await responses.append([append(lease, 0, 10)])
    await responses.add(a_response("resp_2", expires_at=60), owner=None, ttl_s=9, now=1)
    await responses.add(a_response("resp_3", expires_at=70), owner=None, ttl_s=9, now=1)
    assert await responses.delete("resp_1") and not await responses.delete("resp_1")
    assert await responses.append([append(lease, 1, 11)]) == {"resp_1"}
    assert await responses.delete_expired(60, limit=9) == 1
    assert await responses.get("resp_2") is None and await responses.get("resp_3") is not None

    def left(s):
        return [
            s.execute(f"SELECT COUNT(*) FROM {t}")[0][0] for t in ("responses", "response_requests", "response_steps")
        ]

    assert await store._database.read(left) == [1, 1, 0]


async def test_a_conversation_is_found_oldest_first(store):
    responses = store.responses
    await responses.add(a_response("resp_1"), owner=None, ttl_s=9, now=1)
    await responses.add(a_response("resp_2", previous="resp_1"), owner=None, ttl_s=9, now=1)
    await responses.add(a_response("resp_3", previous="resp_2"), owner=None, ttl_s=9, now=1)
    assert [s.record.id for s in await responses.chain("resp_3", most=3)] == ["resp_1", "resp_2", "resp_3"]
    with pytest.raises(RequestError, match="more than 2"):
        await responses.chain("resp_3", most=2)
    await responses.delete("resp_1")
    with pytest.raises(RequestError, match="'resp_1' is gone") as caught:
        await responses.chain("resp_3", most=3)
    assert caught.value.code == "previous_response_not_found"
    with pytest.raises(RequestError, match="does not exist"):
        await responses.chain("resp_9", most=3)
