"""A batch from its file to its end: where each line goes, what is counted, and what ends it early."""

import asyncio
import time

import pytest
from support.batch.batches import FAST, SimulatedExecutor, add_batch, opened, read_lines, request, requests, texts

from cluster.batch.errors import BatchError
from cluster.batch.run.runner import run_batch
from workers.errors import OverloadedError, ReplicaUnavailableError


@pytest.fixture
async def place(tmp_path):
    store, files = opened(tmp_path)
    yield store, files
    await store.close()


async def test_lines_go_where_openai_puts_them(place):
    store, files = place
    batch = await add_batch(store, files, [request("a"), b"\n", request("b", "refuse this"), request("c", seed=1)])
    ended = await run_batch(store, files, SimulatedExecutor(), batch.id, options=FAST)

    assert (ended.status, ended.num_lines, ended.num_completed, ended.num_failed) == ("completed", 3, 2, 1)
    assert (ended.num_prompt_tokens, ended.num_cached_tokens, ended.num_output_tokens) == (14, 6, 10)
    assert ended.remaining_tokens == 0 < ended.estimated_tokens
    assert ended.model == "demo"
    output, errors = read_lines(files, ended.output_file_id), read_lines(files, ended.error_file_id)
    assert [line["custom_id"] for line in output] == ["a", "c"]
    assert set(output[0]) == {"id", "custom_id", "response", "error"}
    assert output[0]["id"].startswith("batch_req_")
    assert output[0]["error"] is None
    assert output[0]["response"]["status_code"] == 200
    assert output[0]["response"]["request_id"] == "req-1"
    [refused] = errors
    assert (refused["custom_id"], refused["error"]) == ("b", None)
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"]["message"] == "No."
    for file_id, purpose in ((ended.output_file_id, "batch_output"), (ended.error_file_id, "batch_output")):
        record = await store.get_file(file_id)
        assert (record.purpose, record.num_bytes) == (purpose, files.path(file_id).stat().st_size)
    assert await store.unpurged() == []


async def test_no_file_is_written_for_no_lines(place):
    store, files = place
    batch = await add_batch(store, files, [request("a")])
    ended = await run_batch(store, files, SimulatedExecutor(), batch.id, options=FAST)
    assert ended.output_file_id is not None
    assert ended.error_file_id is None


async def test_invalid_lines_fail_the_batch_before_it_starts(place):
    store, files = place
    executor = SimulatedExecutor()
    batch = await add_batch(store, files, [request("a"), b"{]\n", request("b"), request("a")])
    ended = await run_batch(store, files, executor, batch.id, options=FAST)
    assert (ended.status, executor.executed) == ("failed", [])
    assert [(e.line, e.code) for e in ended.errors] == [(2, "invalid_json_line")]

    batch = await add_batch(store, files, [request("a"), request("b"), request("a"), request("a")])
    ended = await run_batch(store, files, executor, batch.id, options=FAST)
    assert [(e.line, e.code, e.param) for e in ended.errors] == [
        (3, "duplicate_custom_id", "custom_id"),
        (4, "duplicate_custom_id", "custom_id"),
    ]
    assert ended.failed_at is not None
    assert await store.unpurged() == []


async def test_a_line_without_a_seed_has_one_of_its_own(place):
    store, files = place
    answers = []
    for _ in range(2):
        batch = await add_batch(
            store, files, [request("a"), request("b")], batch_id=f"batch_{'x' * (len(answers) + 1)}"
        )
        ended = await run_batch(store, files, SimulatedExecutor(), batch.id, options=FAST)
        answers.append(texts(read_lines(files, ended.output_file_id)))
    assert len({answers[0]["a"], answers[0]["b"], answers[1]["a"]}) == 3, "by batch and line"


async def test_poison_is_found_and_the_rest_is_answered(place):
    store, files = place
    executor = SimulatedExecutor(latency_s=0.004, capacity=16, poison=["r7", "r33"])
    batch = await add_batch(store, files, requests(60))
    ended = await run_batch(store, files, executor, batch.id, options=FAST)

    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", 58, 2)
    errors = read_lines(files, ended.error_file_id)
    assert [(x["custom_id"], x["response"], x["error"]["code"]) for x in errors] == [
        ("r7", None, "replica_crashed"),
        ("r33", None, "replica_crashed"),
    ]
    assert "out of memory" in errors[0]["error"]["message"]
    assert executor.num_deaths <= 8, "each poison line kills two replicas in groups of sixteen and two, and two alone"
    assert "worked on this request and nothing else" in errors[0]["error"]["message"]
    assert len(texts(read_lines(files, ended.output_file_id))) == 58


async def test_of_few_lines_suspects_run_alone(place):
    store, files = place
    # r6 runs first. Lines take longer than storing results, which wakes the runner while the last suspect runs.
    executor = SimulatedExecutor(latency_s=0.1, capacity=4, poison=["r6"])
    batch = await add_batch(store, files, requests(16))
    ended = await run_batch(store, files, executor, batch.id, options=FAST)
    assert (ended.num_completed, ended.num_failed) == (15, 1)
    assert len(executor.executed) > 17, "there were suspects besides the poison line"
    assert executor.disturbed_suspects == []


async def test_crashes_are_counted_over_restarts(place):
    """Two runners, one crash each: the second one gives up the line."""
    store, files = place
    batch = await add_batch(store, files, [request("bad"), request("good")])

    def fault(line):
        if line.crashes:  # it is not retried in this run
            raise OverloadedError("full", retry_after_s=1)

    async def interrupted() -> None:
        first = SimulatedExecutor(latency_s=0.002, poison=["bad"], capacity=1, fault=fault)
        task = asyncio.create_task(run_batch(store, files, first, batch.id, options=FAST))
        while first.num_deaths == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert first.num_deaths == 1

    await interrupted()
    assert [line.crashes for line in await store.suspects(batch.id)] == [1]
    second = SimulatedExecutor(latency_s=0.002, poison=["bad"], capacity=1)
    ended = await run_batch(store, files, second, batch.id, options=FAST)
    assert second.num_deaths == 1
    assert [x["custom_id"] for x in read_lines(files, ended.error_file_id)] == ["bad"]


async def test_replicas_lost_without_a_crash_do_not_count(place):
    store, files = place
    left = {"r1": 5, "r2": 3}

    def fault(line):
        if left.get(line.custom_id, 0):
            left[line.custom_id] -= 1
            if line.custom_id == "r2":
                raise OverloadedError("full", retry_after_s=0)
            raise ReplicaUnavailableError("the replica was drained")

    batch = await add_batch(store, files, requests(4))
    ended = await run_batch(store, files, SimulatedExecutor(fault=fault), batch.id, options=FAST)
    assert (ended.status, ended.num_completed, left) == ("completed", 4, {"r1": 0, "r2": 0})


async def test_an_executor_error_only_fails_its_line(place):
    store, files = place

    def fault(line):
        if line.custom_id == "r1":
            raise ZeroDivisionError

    batch = await add_batch(store, files, requests(3))
    ended = await run_batch(store, files, SimulatedExecutor(fault=fault), batch.id, options=FAST)
    [line] = read_lines(files, ended.error_file_id)
    assert (line["custom_id"], line["error"]["code"]) == ("r1", "server_error")


async def test_cancelled_keeps_what_was_answered(place):
    store, files = place
    executor = SimulatedExecutor(latency_s=0.01, capacity=4)
    batch = await add_batch(store, files, requests(200))
    task = asyncio.create_task(run_batch(store, files, executor, batch.id, options=FAST))
    while (await store.get_batch(batch.id)).num_completed < 8:
        await asyncio.sleep(0.002)
    asked = await store.cancel_batch(batch.id, now=time.time())
    assert (asked.status, asked.cancelling_at is not None) == ("cancelling", True)
    ended = await asyncio.wait_for(task, 5)
    assert ended.status == "cancelled"
    output, errors = read_lines(files, ended.output_file_id), read_lines(files, ended.error_file_id)
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert len(output) == ended.num_completed >= 8
    assert sorted(x["custom_id"] for x in output + errors) == sorted(f"r{i}" for i in range(200))
    assert (await store.cancel_batch(batch.id, now=time.time())).status == "cancelled"


async def test_cancelled_before_it_started(place):
    store, files = place
    batch = await add_batch(store, files, requests(5))
    await store.cancel_batch(batch.id, now=time.time())
    executor = SimulatedExecutor()
    ended = await run_batch(store, files, executor, batch.id, options=FAST)
    assert (ended.status, ended.output_file_id, executor.executed) == ("cancelled", None, [])


async def test_at_the_deadline_the_rest_expires(place):
    store, files = place
    executor = SimulatedExecutor(latency_s=0.05, capacity=2)
    batch = await add_batch(store, files, requests(500), lasts_s=4.0)
    ended = await asyncio.wait_for(run_batch(store, files, executor, batch.id, options=FAST), 30)
    assert (ended.status, ended.expired_at is not None) == ("expired", True)
    output, errors = read_lines(files, ended.output_file_id), read_lines(files, ended.error_file_id)
    assert {(x["error"]["code"], x["response"]) for x in errors} == {("batch_expired", None)}
    assert len(output) == ended.num_completed
    assert (len(output) + len(errors), ended.num_failed) == (500, len(errors))


async def test_a_batch_past_its_deadline_fails(place):
    store, files = place
    batch = await add_batch(store, files, requests(5), lasts_s=-1)
    ended = await run_batch(store, files, SimulatedExecutor(), batch.id, options=FAST)
    assert (ended.status, ended.num_lines, [e.code for e in ended.errors]) == ("failed", 0, ["batch_expired"])


async def test_an_interrupted_batch_continues(place):
    """A runner that is stopped stores its answers; the next one does not compute them again."""
    store, files = place
    batch = await add_batch(store, files, requests(100))
    executor = SimulatedExecutor(latency_s=0.01, capacity=8)
    task = asyncio.create_task(run_batch(store, files, executor, batch.id, options=FAST))
    while (await store.get_batch(batch.id)).num_completed < 20:
        await asyncio.sleep(0.002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    done = (await store.get_batch(batch.id)).num_completed
    assert 20 <= done == len(executor.answered) < 100
    second = SimulatedExecutor()
    ended = await run_batch(store, files, second, batch.id, options=FAST)
    assert (ended.num_completed, len(second.executed)) == (100, 100 - done)
    assert await run_batch(store, files, second, batch.id, options=FAST) == ended, "a second time changes nothing"


async def test_one_runner_at_a_time(place):
    store, files = place
    batch = await add_batch(store, files, requests(50))
    executor = SimulatedExecutor(latency_s=0.05, capacity=2)
    task = asyncio.create_task(run_batch(store, files, executor, batch.id, options=FAST))
    while not executor.executed:
        await asyncio.sleep(0.002)
    with pytest.raises(BatchError, match="Another process"):
        await run_batch(store, files, executor, batch.id, options=FAST)
    with pytest.raises(BatchError, match="There is no batch"):
        await run_batch(store, files, executor, "batch_none", options=FAST)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_batch_waits_for_capacity(place):
    store, files = place
    executor = SimulatedExecutor(capacity=0)
    batch = await add_batch(store, files, requests(3))
    task = asyncio.create_task(run_batch(store, files, executor, batch.id, options=FAST))
    while (await store.get_batch(batch.id)).status != "in_progress":
        await asyncio.sleep(0.002)
    assert executor.executed == []
    executor.capacity = 1
    assert (await asyncio.wait_for(task, 5)).num_completed == 3
