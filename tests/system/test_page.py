"""The web page in a real browser, with the real application, an API key and scripted replicas.

The browser is Debian's `chromium` package; without it these tests are skipped. After each test, the page must have thrown no exception,
logged no error except for refused requests, and sent requests only to its own server.
"""

import ast
import asyncio
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from support.fakes.replica import FakeReplica, tokens
from support.fakes.router import GPU, LOAD, rank
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.keys.file import add_key
from cluster.keys.key import new_key
from cluster.keys.keyring import Keyring
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ClusterView, DeploymentRecord, GatewayRecord, NodeNotice, ReplicaRecord, ReplicaState
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.errors import EngineError
from workers.protocol import TokenDelta

playwright = pytest.importorskip(
    "playwright.async_api", reason="playwright is a dev dependency: pip install -e '.[dev]'"
)

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE_MS = 30_000
playwright.expect.set_options(timeout=PATIENCE_MS)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs the browser of Debian's package chromium"),
    pytest.mark.asyncio(loop_scope="module"),
]

ENGINE = EngineConfig(model_path="/m", model=load_model_config(DEMO_MODEL))
TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
KEY = "the-right-key"
MODEL = "demo"
TEXT = " one two three four"
IDS = TOKENIZER.encode(f"zero{TEXT}", bos=False)[len(TOKENIZER.encode("zero", bos=False)) :]
TOOL_CALLS_ID = TOKENIZER.tool_calls_token_id
FIRST = TOKENIZER.decode(IDS[:4]).strip()


def revision(digest: str, state: RevisionState = RevisionState.READY) -> AdapterRevision:
    return AdapterRevision(
        id=f"support@{digest}", name="support", source="/adapters", digest=digest, rank=8, num_bytes=1, state=state
    )


ADAPTERS = Registry(
    adapters=(Adapter(name="support", current="support@4f2a91c0d3", canary="support@77b0", canary_share=0.05),),
    revisions=(revision("4f2a91c0d3"), revision("77b0", RevisionState.LOADING)),
)


@dataclass
class Cluster:
    """An Admin: two replicas, the first of which generates 100 tokens between two snapshots."""

    num_snapshots: int = 0
    deployments: tuple[DeploymentRecord, ...] = ()
    drained: list[str] = field(default_factory=list)

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        self.drained.append(replica_id)

    def cluster_view(self) -> ClusterView:
        self.num_snapshots += 1
        common = {"incarnation": "a", "started_at": 0.0}
        ready = ReplicaRecord(
            replica_id="r0",
            state=ReplicaState.READY,
            ready_at=0.0,
            ranks=(
                rank("r0", 0, num_steps=10 * self.num_snapshots, gpu=GPU),
                rank("r0", 1, num_steps=10 * self.num_snapshots),
            ),
            load=_with_tokens(100 * self.num_snapshots),
            **common,
        )
        starting = ReplicaRecord(
            replica_id="r1", state=ReplicaState.STARTING, phase="loading", progress=(30, 120), **common
        )
        lost = ReplicaRecord(replica_id="r2", state=ReplicaState.LOST, reason="Rank 1 was killed.", **common)
        return ClusterView(
            version=1,
            controller_id="c",
            replicas=(ready, starting, lost),
            gateways=(
                GatewayRecord(gateway_id="g", url="http://10.0.0.1:8000", node_id=None, num_running=3, num_queued=7),
            ),
            notices=(
                NodeNotice(
                    node_id="n",
                    node_ip="10.0.0.9",
                    is_head=False,
                    source="aws",
                    cause="AWS terminates this spot instance.",
                    deadline=time.time() + 110,
                    seen_at=0.0,
                ),
            ),
            num_desired=3,
            scaling_reason="The queue is long.",
            adapters=ADAPTERS,
            deployments=self.deployments,
        )


def _with_tokens(count: int) -> Any:
    return type(LOAD)(
        **{name: getattr(LOAD, name) for name in LOAD.__struct_fields__} | {"generated_tokens_total": count}
    )


@dataclass
class Site:
    """A page and its own server. `open` loads the page and enters the key, unless the test does that itself."""

    page: Any
    url: str
    replica: FakeReplica
    cluster: Cluster
    user_key: str  # not an admin key

    async def open(self, path: str = "/", *, key: str | None = KEY) -> None:
        await self.page.goto(self.url + path)
        if key is not None:
            await self.give_key(key)
            await self.page.locator("#key-dialog").wait_for(state="hidden")

    async def give_key(self, key: str) -> None:
        await self.page.get_by_label("Key", exact=True).fill(key)
        await self.page.get_by_role("button", name="Use key").click()

    async def complete(self, prompt: str = "zero") -> None:
        await self.page.get_by_text("Completion", exact=True).click()
        await self.page.get_by_label("Prompt", exact=True).fill(prompt)
        await self.page.get_by_role("button", name="Continue").click()

    async def see(self, selector: str, text: str) -> None:
        await playwright.expect(self.page.locator(selector)).to_contain_text(text)

    async def evaluate(self, module: str, function: str, argument: Any) -> Any:
        """`function(module, argument)` with one of the page's own modules."""
        return await self.page.evaluate(
            f"async (argument) => ({function})(await import('/static/{module}'), argument)", argument
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as p:
        browser = await p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def site(browser: Any, tmp_path: Path) -> AsyncIterator[Site]:
    replica = FakeReplica(tokens(IDS), max_model_len=4096)
    cluster = Cluster()
    user, user_key = new_key("user")
    add_key(tmp_path / "keys.json", user)
    app = make_app(
        router=Router([replica]),
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        model_name=MODEL,
        keyring=Keyring(tmp_path / "keys.json", api_key=KEY),
        admin=cluster,
    )
    async with TestServer(app) as server:
        context = await browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(PATIENCE_MS)
        page = await context.new_page()
        url = str(server.make_url("")).rstrip("/")
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(f"thrown: {error}"))
        page.on("console", lambda m: failures.append(m.text) if _is_failure(m) else None)
        page.on("request", lambda r: failures.append(f"left for {r.url}") if not r.url.startswith(url) else None)
        yield Site(page, url, replica, cluster, user_key)
        replica.release.set()
        await context.close()
        assert not failures


def _is_failure(message: Any) -> bool:
    return message.type in ("error", "warning") and not message.text.startswith(
        "Failed to load resource: the server responded"
    )


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


async def test_the_keyboard_is_enough(site: Site) -> None:
    await site.open(key=None)
    page = site.page
    await page.locator("#key-dialog").wait_for()
    await page.keyboard.type(KEY)
    await page.keyboard.press("Enter")
    await site.see("#model", MODEL)

    async def tab_to(element_id: str) -> None:
        for _ in range(40):
            if await page.evaluate("document.activeElement.id") == element_id:
                return
            await page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach #{element_id}")

    await tab_to("message")
    await page.keyboard.type("Hello")
    await page.keyboard.press("Control+Enter")
    await site.see("#stats", "length limit")
    await tab_to("tab-playground")
    await page.keyboard.press("ArrowRight")
    await site.see("#panel-cluster", "r0")
    tab = page.get_by_role("tab", name="Cluster")
    await playwright.expect(tab).to_be_focused()
    assert await tab.get_attribute("aria-selected") == "true"
    assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    await page.keyboard.press("ArrowLeft")
    await playwright.expect(page.locator("#panel-playground")).to_be_visible()


async def test_the_cluster_is_live(site: Site) -> None:
    await site.open("/#cluster")
    page = site.page
    for text in (
        "1 of 3 replicas ready",
        "The queue is long.",
        "loading 25 %",
        "Rank 1 was killed.",
        "Node 10.0.0.9 stops in 1 min: AWS terminates this spot instance.",
        "http://10.0.0.1:8000",
    ):
        await site.see("#panel-cluster", text)
    first = page.locator(".card").first
    await site.see(".card:first-child table >> nth=0", "20.0 ms")
    await site.see(".card:first-child table >> nth=0", "5.0 ms")
    await playwright.expect(first.get_by_role("meter")).to_have_attribute("aria-valuenow", "25")
    rate = page.locator(".figure .value").first
    await playwright.expect(rate).to_have_text(re.compile(r"^\d+$"))  # not while a poll of a busy machine took long
    assert 15 <= int(await rate.inner_text()) <= 101
    await page.get_by_role("tab", name="Playground").click()
    before = site.cluster.num_snapshots
    await asyncio.sleep(1.3)
    assert site.cluster.num_snapshots <= before + 1, "a hidden view must not poll"


async def test_a_key_that_is_not_an_admin_key_sees_the_health_only(site: Site) -> None:
    site.replica.reason = "Rank 1 does not answer."
    await site.open("/#cluster", key=site.user_key)
    await site.see("#panel-cluster", "requires an admin key")
    await site.see("#panel-cluster", "Not ready")
    await site.see(".card", "Rank 1 does not answer.")
    site.replica.reason = None
    await site.see("#panel-cluster", "Ready")
    assert site.cluster.num_snapshots == 0
    await site.page.get_by_role("button", name="Key").click()
    await site.give_key(KEY)
    await site.see("#panel-cluster", "1 of 3 replicas ready")


async def test_dark_and_light(site: Site) -> None:
    await site.open()
    page = site.page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(ground)
    await page.emulate_media(color_scheme="dark")
    dark = await page.evaluate(ground)
    assert sum(_rgb(light)) > 700 > 100 > sum(_rgb(dark))
    toggle = page.get_by_role("button", name="Dark theme")
    await playwright.expect(toggle).to_have_attribute("aria-pressed", "true")  # the page handles the change as an event
    await toggle.click()
    assert await page.evaluate(ground) == light
    await page.reload()
    assert await page.evaluate(ground) == light
    await page.get_by_role("link", name="API").click()
    await page.locator("details.operation").first.wait_for()
    assert await page.evaluate(ground) == light


def _rgb(color: str) -> list[int]:
    return [int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize("path", ["/", "/#cluster", "/docs"])
async def test_a_phone_scrolls_one_way_only(site: Site, path: str) -> None:
    page = site.page
    await page.set_viewport_size({"width": 360, "height": 700})
    await site.open(path)
    if path == "/":
        await page.locator("#parameters > summary").click()
        await page.get_by_label("Message", exact=True).fill("x" * 500)
        await page.keyboard.press("Control+Enter")
        await site.see("#stats", "Total")
    else:
        await page.locator(".card, details.operation").first.wait_for()
        await page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        await page.evaluate("new Promise(requestAnimationFrame)")
    wide = """() => [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest(".visually-hidden, .skip, pre, svg")).map((e) => e.outerHTML.slice(0, 80))"""
    assert await page.evaluate("document.documentElement.scrollWidth") <= 360, await page.evaluate(wide)


async def test_the_documentation_lists_tries_and_links_everything(site: Site) -> None:
    await site.open("/docs")
    page = site.page
    spec = """fetch("openapi.json", {headers: {Authorization: `Bearer ${sessionStorage["tramontane.key"]}`}})"""
    paths = await page.evaluate(f"{spec}.then((r) => r.json()).then((spec) => Object.keys(spec.paths))")
    assert "/v1/completions" in paths
    for path in paths:
        await playwright.expect(
            page.locator("main details.operation > summary > code").get_by_text(path, exact=True)
        ).not_to_have_count(0)  # one for each method
    await page.locator("#contents a").first.click()
    operation = page.locator("details.operation[open]")
    await playwright.expect(operation.locator(".fields").get_by_text("temperature", exact=True)).to_be_visible()
    body = operation.get_by_label("Body")
    await playwright.expect(body).to_have_value(re.compile(f'"model": "{MODEL}"'))
    await operation.get_by_role("button", name="Send").click()
    await playwright.expect(operation.locator("[aria-label=Response]")).to_contain_text(TEXT.strip())
    await playwright.expect(operation.get_by_role("status")).to_contain_text("200")


# Single modules


async def test_events_in_pieces_of_any_size(site: Site) -> None:
    await site.open()
    wire = ': keep-alive\r\n\r\ndata: {"a": "é😀"}\n\ndata:two\r\rdata: l1\ndata: l2\nid: 4\n\ndata: cut'.encode()
    expected = ['{"a": "é😀"}', "two", "l1\nl2"]
    cuts = [[i] for i in range(len(wire) + 1)] + [list(range(1, len(wire)))]
    read = """async ({ eventsOf }, [bytes, cuts]) => {
        const results = [];
        for (const cut of cuts) {
            const edges = [0, ...cut, bytes.length];
            const body = new ReadableStream({ start(c) {
                for (let i = 1; i < edges.length; i++) c.enqueue(new Uint8Array(bytes.slice(edges[i - 1], edges[i])));
                c.close();
            }});
            results.push(await Array.fromAsync(eventsOf(body)));
        }
        return results;
    }"""
    for cut, result in zip(cuts, await site.evaluate("sse.js", read, [list(wire), cuts]), strict=True):
        assert result == expected, f"cut at {cut}"


NASTY = "it's \"quoted\" `back` $HOME \\ \\n %s ! é😀\nnew line\ttab \x01 '''"
BODIES: list[dict[str, Any]] = [
    {"model": MODEL, "prompt": NASTY, "max_tokens": 5, "stop": ["'", "\n"], "stream": True, "top_k": 3, "seed": 9007199254740991},
    {"model": MODEL, "messages": [{"role": "user", "content": NASTY}], "temperature": 0.25, "stream": True,
     "stream_options": {"include_usage": True}, "response_format": {"type": "json_object"}, "ignore_eos": False, "logit_bias": None},
]  # fmt: skip


async def test_copied_requests_are_the_request(site: Site) -> None:
    await site.open()
    url = "http://127.0.0.1:8000/v1/completions"
    write = """({ asCurl, asPython }, [url, body, options]) =>
        [asCurl(url, body, options), asPython("http://x/v1", body, options)]"""
    for body, with_key in itertools.product(BODIES, [True, False]):
        options = {"withKey": with_key, "chat": "messages" in body}
        curl, python = await site.evaluate("snippets.js", write, [url, body, options])
        arguments = run_shell(f"curl() {{ printf '%s\\0' \"$@\"; }}\nTRAMONTANE_API_KEY='k e y'\n{curl}")
        assert url in arguments
        assert json.loads(arguments[arguments.index("--data-raw") + 1]) == body
        assert ("Authorization: Bearer k e y" in arguments) == with_key
        (call,) = [
            node
            for node in ast.walk(ast.parse(python))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("completions.create")
        ]
        sent = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert sent | sent.pop("extra_body", {}) == body
        assert ('os.environ["TRAMONTANE_API_KEY"]' in python) == with_key


async def test_copying_from_the_page(site: Site) -> None:
    await site.open()
    await site.page.get_by_label("Message", exact=True).fill(NASTY)
    await site.page.get_by_role("button", name="Copy as curl").click()
    await site.see(".toast", "curl command")
    curl = await site.page.evaluate("navigator.clipboard.readText()")
    assert "--data-raw" in curl
    if shutil.which("curl"):
        streamed = await asyncio.to_thread(run_shell, f"TRAMONTANE_API_KEY={KEY}\n{curl}")
        assert "[DONE]" in streamed[0]
        assert NASTY in TOKENIZER.decode(site.replica.requests[-1].prompt_token_ids)
    await site.page.get_by_role("button", name="Copy as Python").click()
    await site.see(".toast", "Python program")
    assert "from openai import OpenAI" in await site.page.evaluate("navigator.clipboard.readText()")


def run_shell(script: str) -> Sequence[str]:
    """What a POSIX shell's command printed, split at NUL."""
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split("\0")


async def test_the_cluster_view_shows_what_operators_ask_first(site: Site) -> None:
    await site.open()
    await site.complete()
    await site.see("#output", "one")
    await site.page.locator("#tab-cluster").click()
    await site.see(".operations", "To the first token")
    await site.see(".operations", "HTTP 200")
    await site.see(".operations", "Failovers")
    await site.see(".operations table >> nth=1", "--api-key")
    first = await site.page.locator(".operations td").first.inner_text()
    assert re.fullmatch(r"[\d.]+ m?s", first), first
    card = site.page.get_by_role("region", name="Adapters")
    assert (await card.locator("tbody tr").all_inner_texts()) == ["support\t4f2a91c0\t77b0 (loading), 5 %\t–"]
    gpus = site.page.locator(".replicas table").filter(has_text="GPU of rank")
    assert (await gpus.locator("tbody tr").all_inner_texts()) == ["0\t21.0 of 24.0 GiB\t61 °C"]


def deployment(name: str, *replica_ids: str, num_desired: int, adapters: tuple[str, ...] = ()) -> DeploymentRecord:
    return DeploymentRecord(
        name=name,
        replica_ids=replica_ids,
        num_desired=num_desired,
        scaling_reason=f"{num_desired} replicas wanted.",
        spec=ClusterSpec(model_name=name, engine=ENGINE, min_replicas=0),
        failure=None,
        facts=None,
        adapters=adapters,
    )


async def test_each_of_several_models_shows_its_state_and_its_adapters(site: Site) -> None:
    site.cluster.deployments = (
        deployment("chat", "r0", num_desired=1, adapters=("support",)),
        deployment("code", num_desired=0),
        deployment("math", "r1", num_desired=1),
    )
    await site.open("/#cluster")
    heads = site.page.locator(".heads .panel-head")
    await playwright.expect(heads).to_have_text(
        [
            "chatready1 of 1 replica ready · scales from 0 to 1",
            "codeasleepno replica runs, the next request starts one · scales from 0 to 1",
            "mathwaking0 of 1 replica ready · scales from 0 to 1",
        ]
    )
    await playwright.expect(site.page.get_by_role("rowheader", name="support of chat")).to_be_visible()


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


async def test_quantiles_are_those_of_prometheus(site: Site) -> None:
    await site.open()
    asked = [[[1, 2, 4], [0, 10, 10, 10], 0.5], [[1, 2], [5, 10, 10], 0.99], [[1], [0, 4], 0.5], [[1], [0, 0], 0.5]]
    found = await site.evaluate("operations_view.js", "(m, a) => a.map((x) => m.quantile(...x))", asked)
    assert found == [1.5, pytest.approx(1.98), 1, None]
    fresh = [{"counts": [1, 2, 2]}, {"counts": [1, 5, 6]}]
    assert await site.evaluate("operations_view.js", "(m, [a, b]) => m.since(a, b)", fresh) == [0, 3, 4]


async def test_the_selected_segment_and_the_empty_prompt(site: Site) -> None:
    """In the dark theme the selected segment is lighter than its group; on a phone the prompt leaves room for the answer."""
    await site.page.set_viewport_size({"width": 375, "height": 667})
    await site.page.emulate_media(color_scheme="dark")
    await site.open()
    await site.page.get_by_text("Completion", exact=True).click()
    colors = await site.page.evaluate(
        "['.segmented', '.segmented input:checked + span'].map((s) => getComputedStyle(document.querySelector(s)).backgroundColor)"
    )
    group, selected = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert selected > group + 60, colors
    height = await site.page.evaluate("document.querySelector('#prompt').getBoundingClientRect().height / innerHeight")
    assert height < 0.2
    await site.page.emulate_media(color_scheme=None)
