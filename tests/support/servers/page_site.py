"""The web page with its own server: the real application, an API key and scripted replicas, as tests see it in a browser.

The browser is Debian's `chromium` package; without it, or without playwright, the tests that import this file are skipped.
"""

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from cluster.api.app import make_app
from cluster.keys.file import add_key
from cluster.keys.key import new_key
from cluster.keys.keyring import Keyring
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from cluster.protocol.view import ClusterView, DeploymentRecord, GatewayRecord, NodeNotice, ReplicaRecord, ReplicaState
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from support.fakes.replica import FakeReplica, tokens
from support.fakes.router import GPU, LOAD, rank
from support.paths import DEMO_MODEL

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
# Of every file of tests with the page.
MARKS = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs the browser of Debian's package chromium"),
    pytest.mark.asyncio(loop_scope="session"),
]

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


@asynccontextmanager
async def open_browser() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as p:
        browser = await p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        await browser.close()


@asynccontextmanager
async def open_site(browser: Any, tmp_path: Path) -> AsyncIterator[Site]:
    """After a test, the page must have thrown no exception, logged no error except for refused requests, and sent requests only to its
    own server.
    """
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
