"""Grammars are built in threads, within a time limit; one that never ends delays only its own request."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from support.fakes.core import FACTS
from support.servers.live_replica import TOKENIZER

from cluster.api.generation import structured as structured_module
from cluster.api.generation.structured import MAX_AT_ONCE, Grammars
from cluster.api.generation.tenant_slots import TenantSlots
from cluster.text.grammar.compiler import GrammarKind, StructuredOutput
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
        await grammars.run(lambda: endless(never), param="x", tenant=None)
    assert refused.value.param == "x"
    assert await grammars.run(lambda: "quick", param="x", tenant=None) == "quick", "another grammar still has a slot"


async def test_occupied_slots_are_free_again_when_their_threads_end(never: threading.Event) -> None:
    grammars = Grammars(TOKENIZER, time_limit_s=0.05)
    for _ in range(MAX_AT_ONCE):
        with pytest.raises(RequestError):
            await grammars.run(lambda: endless(never), param="x", tenant=None)
    with pytest.raises(RequestError, match="try again later"):
        await grammars.run(lambda: "quick", param="x", tenant=None)
    never.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert await grammars.run(lambda: "quick", param="x", tenant=None) == "quick"
            return
        except RequestError:
            assert time.monotonic() < deadline, "the slots were not freed"


async def test_errors_are_passed_on() -> None:
    def fail() -> str:
        raise RequestError("No.", param="y")

    with pytest.raises(RequestError, match="No"):
        await Grammars(TOKENIZER).run(fail, param="x", tenant=None)


async def test_one_tenant_does_not_keep_another_waiting(never: threading.Event) -> None:
    """Of two slots, a tenant has one; its further grammars wait for it, and the next tenant's does not."""
    grammars = Grammars(TOKENIZER, time_limit_s=20)
    floods = [asyncio.create_task(grammars.run(lambda: endless(never), param="x", tenant="flood")) for _ in range(5)]
    await asyncio.sleep(0)
    for tenant in ("other", "third", "other"):
        assert await grammars.run(lambda: "quick", param="x", tenant=tenant) == "quick"
    assert not any(flood.done() for flood in floods)
    never.set()
    assert await asyncio.gather(*floods) == ["too late"] * 5


class FakeCompiler:
    """A grammar in Lark takes until `may_end` is set. `order`: in which order they ended."""

    def __init__(self) -> None:
        self.may_end, self.order = threading.Event(), list[str]()

    def compile(self, output: StructuredOutput, *, at_start: bool, param: str) -> str:
        if output.kind == "grammar":
            assert self.may_end.wait(20)
        self.order.append(output.value or output.kind)
        return ""


@pytest.mark.parametrize("num_attackers", [1, 2])
async def test_a_plain_format_does_not_wait_for_another_keys_second_grammar(
    num_attackers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One attacker leaves a slot free; two occupy both, and have their next grammars ready before the plain request comes."""
    compiler = FakeCompiler()
    monkeypatch.setattr(structured_module, "GrammarCompiler", lambda *_, **__: compiler)
    grammars = Grammars(TOKENIZER)
    attackers = [f"attacker {i}" for i in range(num_attackers)]

    def start(kind: GrammarKind, value: str | None, tenant: str) -> asyncio.Task[str]:
        output = StructuredOutput(kind, value)
        return asyncio.create_task(
            grammars.compile(output, at_start=True, param="response_format", facts=FACTS, tenant=tenant)
        )

    await grammars.compiler(FACTS)
    attack = [start("grammar", f"slow {turn}", tenant) for turn in (1, 2, 3) for tenant in attackers]
    await asyncio.sleep(0)
    plain = start("json_object", None, "other")
    await asyncio.sleep(0)
    if num_attackers == 1:
        await asyncio.wait_for(plain, 20)
    compiler.may_end.set()
    await asyncio.wait_for(asyncio.gather(plain, *attack), 20)
    order = compiler.order
    assert sorted(order) == sorted(["json_object", *["slow 1", "slow 2", "slow 3"] * num_attackers])
    assert not {"slow 2", "slow 3"} & set(order[: order.index("json_object")]), order


async def test_tenants_take_turns() -> None:
    turns, order = TenantSlots(1), []

    async def work(tenant: str) -> None:
        await turns.acquire(tenant)
        order.append(tenant)
        turns.release(tenant)

    await turns.acquire("first")
    waiting = [asyncio.create_task(work(tenant)) for tenant in ("a", "a", "a", "b", "c", "b")]
    await asyncio.sleep(0)
    turns.release("first")
    await asyncio.gather(*waiting)
    assert order == ["a", "b", "c", "a", "b", "a"]


async def test_a_tenant_that_was_just_served_is_the_last() -> None:
    """Though its next request came before those of the others."""
    turns, order = TenantSlots(1), []

    async def work(tenant: str) -> None:
        await turns.acquire(tenant)
        order.append(tenant)
        turns.release(tenant)

    await turns.acquire("a")
    waiting = [asyncio.create_task(work(tenant)) for tenant in ("a", "a", "b", "c")]
    await asyncio.sleep(0)
    turns.release("a")
    await asyncio.gather(*waiting)
    assert order == ["b", "c", "a", "a"]


async def test_a_request_that_stops_waiting_gives_its_turn_away() -> None:
    turns = TenantSlots(1)
    await turns.acquire("a")
    gone, next_one = asyncio.create_task(turns.acquire("b")), asyncio.create_task(turns.acquire("c"))
    await asyncio.sleep(0)
    gone.cancel()
    turns.release("a")
    await next_one
    late = asyncio.create_task(turns.acquire("b"))
    await asyncio.sleep(0)
    turns.release("c")
    late.cancel()  # its turn has just come
    await asyncio.gather(late, return_exceptions=True)
    await asyncio.wait_for(turns.acquire("d"), 5)
