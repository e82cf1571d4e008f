"""Grammars are built in threads, within a time limit; one that never ends delays only its own request."""

import threading
import time
from collections.abc import Iterator

import pytest
from support.servers.live_replica import TOKENIZER

from cluster.api.generation.structured import MAX_AT_ONCE, Grammars
from workers.errors import RequestError


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def endless(event: threading.Event) -> str:
    event.wait()
    return "too late"


async def test_a_grammar_that_takes_too_long_is_refused(never: threading.Event) -> None:
    grammars = Grammars(TOKENIZER, time_limit_s=0.05)
    with pytest.raises(RequestError, match=r"'x': building its grammar took more than 0\.05 s") as refused:
        await grammars.run(lambda: endless(never), param="x")
    assert refused.value.param == "x"
    assert await grammars.run(lambda: "quick", param="x") == "quick", "another grammar still has a slot"


async def test_occupied_slots_are_free_again_when_their_threads_end(never: threading.Event) -> None:
    grammars = Grammars(TOKENIZER, time_limit_s=0.05)
    for _ in range(MAX_AT_ONCE):
        with pytest.raises(RequestError):
            await grammars.run(lambda: endless(never), param="x")
    with pytest.raises(RequestError, match="try again later"):
        await grammars.run(lambda: "quick", param="x")
    never.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert await grammars.run(lambda: "quick", param="x") == "quick"
            return
        except RequestError:
            assert time.monotonic() < deadline, "the slots were not freed"


async def test_errors_are_passed_on() -> None:
    def fail() -> str:
        raise RequestError("No.", param="y")

    with pytest.raises(RequestError, match="No"):
        await Grammars(TOKENIZER).run(fail, param="x")
