"""The playground: a key, completions, conversations, tool calls, and failures in the server's words."""

import asyncio
import json

import pytest
from support.fakes.replica import tokens
from support.servers.page_site import FIRST, IDS, KEY, MARKS, MODEL, TEXT, TOKENIZER, TOOL_CALLS_ID, Site, playwright

from workers.errors import EngineError
from workers.protocol import TokenDelta

pytestmark = MARKS


async def test_the_page_asks_for_the_key_and_refuses_a_wrong_one(site: Site) -> None:
    await site.open(key=None)
    await playwright.expect(site.page.get_by_label("Key", exact=True)).to_be_focused()
    await site.give_key("a-wrong-key")
    await site.see("#key-error", "does not accept this key")
    await site.give_key(KEY)
    await site.page.locator("#key-dialog").wait_for(state="hidden")
    await site.see("#model", MODEL)
    await site.page.reload()
    await site.see("#model", MODEL)  # stored for this tab
    stored = "() => [sessionStorage, localStorage].map((s) => Object.values(s).join())"
    assert await site.page.evaluate(stored) == [KEY, ""]

    await site.page.get_by_role("button", name="Key").click()
    await site.page.get_by_label("Remember it").check()
    await site.give_key(KEY)
    await site.page.locator("#key-dialog").wait_for(state="hidden")
    assert await site.page.evaluate(stored) == ["", KEY]

    await site.page.get_by_role("button", name="Key").click()
    await site.page.get_by_role("button", name="Forget key").click()
    await site.see("#key-dialog", "This server requires an API key")
    assert await site.page.evaluate(stored) == ["", ""]


async def test_a_completion_appears_as_it_arrives(site: Site) -> None:
    site.replica.hold_after = 4
    await site.open()
    await site.complete()
    await site.see("#output", FIRST)
    assert "four" not in await site.page.inner_text("#output")
    await playwright.expect(site.page.get_by_role("button", name="Stop")).to_be_visible()
    site.replica.release.set()
    await site.see("#stats", "length limit")
    assert await site.page.inner_text("#output") == TEXT
    for part in (f"Tokens {len(IDS)}", "tokens/s", "First token", "1 cached"):
        assert part in " ".join((await site.page.inner_text("#stats")).split())
    await site.page.get_by_role("button", name="Append to prompt").click()
    assert await site.page.input_value("#prompt") == "zero" + TEXT


@pytest.mark.parametrize("how", ["button", "Escape"])
async def test_stop_also_aborts_the_request_on_the_replica(site: Site, how: str) -> None:
    site.replica.hold_after = 4
    await site.open()
    await site.complete()
    await site.see("#output", FIRST)
    if how == "button":
        await site.page.get_by_role("button", name="Stop").click()
    else:
        await site.page.keyboard.press(how)
    await asyncio.wait_for(site.replica.closed.wait(), 30)
    assert site.replica.aborted
    await site.see("#stats", "stopped by you")
    assert FIRST in await site.page.inner_text("#output")
    await playwright.expect(site.page.get_by_role("button", name="Continue")).to_be_visible()


async def test_a_chat_keeps_its_conversation_and_parameters_are_sent(site: Site) -> None:
    await site.open()
    page = site.page
    await page.get_by_text("System prompt").click()
    await page.get_by_role("textbox", name="System prompt").fill("Be short.")
    for label, value in {"Max tokens": "12", "Top p": "0.9", "Top k": "40", "Min p": "0.05", "Seed": "7"}.items():
        await page.get_by_label(label, exact=True).fill(value)
    await page.get_by_label("Stop at").fill("\\n\\n\nEND")
    answer = TEXT.strip()
    for question in ("First?", "Second?"):
        await page.get_by_label("Message", exact=True).fill(question)
        await page.keyboard.press("Control+Enter")
        await site.see("#log li:last-child.assistant", answer)
        await site.see("#stats", "Total")
    sampling = site.replica.requests[0].sampling
    assert (sampling.max_tokens, sampling.top_p, sampling.top_k, sampling.min_p) == (12, 0.9, 40, 0.05)
    assert sampling.temperature == 0.7
    texts = [TOKENIZER.decode(request.prompt_token_ids) for request in site.replica.requests]
    for text, parts in zip(texts, (["Be short.", "First?"], ["Be short.", "First?", answer, "Second?"]), strict=True):
        positions = [text.find(part) for part in parts]
        assert -1 not in positions, f"{parts} in {text!r}"
    assert "Second?" not in texts[0]
    await page.get_by_role("button", name="Clear").click()
    await site.see("#chat-empty", "Start a conversation")


async def test_a_tool_call_takes_its_result(site: Site) -> None:
    call = TOKENIZER.encode('[{"name": "weather", "arguments": {"city": "Rome"}}]', bos=False)
    scripts = iter([tokens([TOOL_CALLS_ID, *call], stop_token_id=2), tokens(IDS)])
    site.replica.script = lambda request: next(scripts)(request)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    await site.open()
    page = site.page
    await page.get_by_text("More", exact=True).click()
    await page.get_by_label("Other fields").fill(json.dumps({"tools": [tool]}))
    message = page.get_by_label("Message", exact=True)
    await message.fill("Is it windy?")
    await page.keyboard.press("Control+Enter")
    await playwright.expect(message).to_have_attribute("placeholder", "Result of weather")
    shown = page.locator("#log .assistant .text").first
    await playwright.expect(shown).to_have_attribute("data-calls", 'weather({"city": "Rome"})')
    await message.fill("From the north.")
    await page.keyboard.press("Control+Enter")
    await site.see("#log li:last-child.assistant", TEXT.strip())
    await playwright.expect(message).to_have_attribute("placeholder", "Message")
    prompt = TOKENIZER.decode(site.replica.requests[1].prompt_token_ids)
    assert prompt.index("Is it windy?") < prompt.index("Rome") < prompt.index("From the north.")


async def test_failures_are_shown_in_the_servers_words(site: Site) -> None:
    site.replica.script = lambda request: [
        TokenDelta(request_id=request.request_id, token_ids=IDS[:3]),
        EngineError("The engine had a bad day."),
    ]
    await site.open()
    page = site.page
    await site.complete()
    await site.see("#trouble", "The engine had a bad day.")
    assert await page.inner_text("#output") != ""
    await page.get_by_label("Temperature", exact=True).fill("9")
    await page.get_by_text("Chat", exact=True).click()
    await page.get_by_label("Message", exact=True).fill("Keep this.")
    await page.get_by_role("button", name="Send").click()
    await site.see("#trouble", "temperature")
    assert await page.input_value("#message") == "Keep this."  # typed text is kept
    await page.get_by_label("Seed").fill("1.5")
    await page.get_by_role("button", name="Send").click()
    await site.see("#trouble", "Seed must be a whole number.")
    await playwright.expect(page.get_by_label("Seed")).to_be_focused()


async def test_a_response_that_does_not_begin_says_why(site: Site) -> None:
    site.replica.hold_after = 0
    await site.open()
    await site.complete()
    await site.see("#waiting", f"Waiting for {MODEL} for")
    await site.see("#waiting", "Its replicas are busy.")
    site.replica.reason = "Replica r0 is loading."
    await site.see("#waiting", "Replica r0 is loading.")
    site.replica.reason = None
    site.replica.release.set()
    await site.see("#stats", "length limit")
    await playwright.expect(site.page.locator("#waiting")).to_be_hidden()
