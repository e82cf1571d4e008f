"""Which adapter leaves its slot, and how requests share the slots with a scheduler: nobody waits for ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import add, make_scheduler, play, run_step

from workers.lora.slots import NO_SLOT, AdapterSlots, Assignment
from workers.protocol import BATCH_PRIORITY


def test_the_least_recently_used_leaves():
    slots = AdapterSlots(2)
    assert [slots.start("a"), slots.start("b")] == [0, 1]
    assert slots.take_new() == [Assignment(0, "a"), Assignment(1, "b")]
    assert not slots.has_room("c") and slots.has_room("a")
    slots.end("b")
    slots.end("a")
    slots.start("a")
    slots.end("a")
    assert slots.start("c") == 1, "b was used longest ago"
    assert slots.take_new() == [Assignment(1, "c")]
    assert set(slots.adapters) == {"a", "c"}
    slots.start("a")
    assert slots.take_new() == [], "it was there"


def test_what_is_in_use_stays():
    slots = AdapterSlots(1)
    slots.start("a")
    slots.start("a")
    slots.end("a")
    assert not slots.has_room("b")
    with pytest.raises(AssertionError, match="a is in use"):
        slots.remove("a")
    slots.end("a")
    slots.remove("a")
    assert slots.start("b") == 0
    assert slots.take_new() == [Assignment(0, "b")], "a left before anybody was told"


def with_slots(num_slots, **sizes):
    return make_scheduler(**sizes, slots=AdapterSlots(num_slots))


def test_others_pass_a_request_without_a_slot():
    scheduler = with_slots(1)
    add(scheduler, 0, 3, adapter="a", max_tokens=3)
    waiting = add(scheduler, 1, 3, adapter="b")
    add(scheduler, 2, 3)
    assert run_step(scheduler) == {"0": 3, "2": 3}
    assert waiting.adapter_slot == NO_SLOT
    assert run_step(scheduler) == run_step(scheduler) == {"0": 1, "2": 1}
    assert run_step(scheduler) == {"2": 1, "1": 3}, "a has ended"
    assert waiting.adapter_slot == 0


def test_a_request_without_a_slot_is_not_starved():
    """Requests of the adapters in the slots come without end: those of one of them wait until its slot has changed hands."""
    scheduler = with_slots(2, max_num_seqs=6, max_num_batched_tokens=64)
    for i in range(4):
        add(scheduler, i, 3, adapter="ab"[i % 2], max_tokens=4)
    waiting = add(scheduler, 4, 3, adapter="c")
    for i in range(5, 20):
        add(scheduler, i, 3, adapter="ab"[i % 2], max_tokens=4)
        run_step(scheduler)
        if waiting.adapter_slot != NO_SLOT:
            break
    assert waiting.adapter_slot != NO_SLOT, "it runs"
    assert i < 12


def test_better_requests_take_the_slots_of_worse_ones():
    scheduler = with_slots(2)
    add(scheduler, 0, 3, adapter="a", priority=BATCH_PRIORITY)
    add(scheduler, 1, 3, adapter="b", priority=BATCH_PRIORITY)
    add(scheduler, 2, 3, adapter="b")
    run_step(scheduler)
    online = add(scheduler, 3, 3, adapter="c")
    assert run_step(scheduler) == {"2": 1, "3": 3, "1": 1}
    assert online.adapter_slot == 1, "a's, which no online request uses"
    assert [r.request_id for r in scheduler.waiting] == ["0"]
    another = add(scheduler, 4, 3, adapter="d")
    run_step(scheduler)
    assert another.adapter_slot == NO_SLOT, "online requests do not preempt each other"


@settings(max_examples=60)
@given(st.data())
def test_every_request_ends_and_a_slot_has_one_adapter_at_a_time(data):
    num_slots = data.draw(st.integers(1, 3))
    scheduler = with_slots(num_slots, num_blocks=12, max_num_seqs=4)
    tables = [None] * num_slots
    requests = []
    for _ in range(400):
        if len(requests) < 14 and data.draw(st.booleans()):
            adapter = data.draw(st.sampled_from([None, *"abcd"]))
            priority = data.draw(st.sampled_from([0, 0, BATCH_PRIORITY]))
            num_tokens = data.draw(st.integers(1, 20))
            requests.append(
                add(
                    scheduler,
                    len(requests),
                    num_tokens,
                    adapter=adapter,
                    priority=priority,
                    max_tokens=data.draw(st.integers(1, 9)),
                )
            )
        elif len(requests) == 14 and not scheduler.has_work():
            break
        scheduled = scheduler.schedule()
        for new in scheduler.slots.take_new():
            tables[new.slot] = new.adapter
        for s in scheduled:
            assert (None if s.request.adapter_slot == NO_SLOT else tables[s.request.adapter_slot]) == s.request.adapter
        play(scheduler, scheduled)
    assert not scheduler.has_work(), f"{len(scheduler.waiting)} wait"
    assert all(r.num_output_tokens == r.sampling.max_tokens for r in requests)
