"""What event loops and named functions leave in a recording, and that they are themselves again afterwards."""

import asyncio

from workers.profile.recording import TraceEvent
from workers.profile.spans import SpanRecorder
from workers.profile.targets import Target


class Shop:
    def sell(self) -> str:
        return "sold"

    async def wait(self, event: asyncio.Event) -> str:
        await event.wait()
        return self.sell()

    async def hurry(self) -> str:
        return self.sell()


TARGETS = (Target(Shop, "sell", "sale"), Target(Shop, "wait", "wait for it"), Target(Shop, "hurry", "hurry"))


async def customers(shop: Shop) -> list[str]:
    event = asyncio.Event()

    async def first() -> str:
        return await shop.wait(event)

    async def second() -> str:
        event.set()
        return await shop.hurry()

    return list(await asyncio.gather(first(), second()))


def record(**options: int) -> SpanRecorder:
    recorder = SpanRecorder(TARGETS, **options)
    recorder.start()
    try:
        assert asyncio.run(customers(Shop())) == ["sold", "sold"]
    finally:
        recorder.stop()
    return recorder


def contains(outer: TraceEvent, inner: TraceEvent) -> bool:
    return outer.ts <= inner.ts and inner.ts + inner.dur <= outer.ts + outer.dur


def test_functions_lie_in_the_step_of_the_task_that_called_them():
    events = record().recording().decoded()
    complete = [event for event in events if event.ph == "X"]
    sales = [event for event in complete if event.name == "sale"]
    steps = [event for event in complete if event.name.endswith((".first", ".second"))]
    assert (len(sales), len(steps)) == (2, 3), "the first customer's task ran twice"
    assert all(any(contains(step, sale) for step in steps) for sale in sales)
    (hurry,) = [event for event in complete if event.name == "hurry"]
    assert any(contains(hurry, sale) for sale in sales)


def test_a_coroutine_that_waits_has_a_row_of_its_own():
    events = record().recording().decoded()
    begin, end = [event for event in events if event.name == "wait for it"]
    assert (begin.ph, end.ph) == ("b", "e")
    assert begin.id == end.id
    assert begin.ts < end.ts


def test_a_coroutine_that_still_waits_ends_with_the_recording():
    async def stop_while_it_waits() -> SpanRecorder:
        recorder, event, shop = SpanRecorder(TARGETS), asyncio.Event(), Shop()
        recorder.start()
        waiting = asyncio.create_task(shop.wait(event))
        await asyncio.sleep(0)
        recorder.stop()
        event.set()
        await waiting
        return recorder

    events = asyncio.run(stop_while_it_waits()).recording().decoded()
    assert [event.ph for event in events if event.name == "wait for it"] == ["b", "e"]


def test_threads_have_names():
    recording = record().recording()
    names = {event.tid: event.args["name"] for event in recording.decoded() if event.ph == "M"}
    assert {names[event.tid] for event in recording.decoded() if event.ph == "X"} == {"MainThread"}


def test_only_the_time_that_was_asked_for():
    recorder = record()
    (hurry,) = [event for event in recorder.recording().decoded() if event.name == "hurry"]
    at_ns = recorder.recording().base_ns + int(1000 * (hurry.ts + hurry.dur / 2))
    names = {event.name for event in recorder.recording(between=(at_ns, at_ns)).decoded() if event.ph != "M"}
    assert "hurry" in names
    assert len(names) < len({event.name for event in recorder.recording().decoded()}) - 1


def test_the_newest_are_kept():
    recording = record(max_spans=2).recording()
    assert len([event for event in recording.decoded() if event.ph == "X"]) == 2
    assert recording.num_left_out > 3


def test_nothing_stays():
    before = {name: vars(Shop)[name] for name in ("sell", "wait", "hurry")}, vars(asyncio.Handle)["_run"]
    recorder = SpanRecorder(TARGETS)
    recorder.start()
    assert vars(Shop)["sell"] is not before[0]["sell"]
    recorder.stop()
    recorder.stop()
    assert ({name: vars(Shop)[name] for name in ("sell", "wait", "hurry")}, vars(asyncio.Handle)["_run"]) == before
