"""The view of the cluster: live, for operators, and only the health without an admin key."""

import asyncio
import re

from support.paths import DEMO_MODEL
from support.servers.page_site import KEY, MARKS, Site, playwright

from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import DeploymentRecord
from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig

pytestmark = MARKS

ENGINE = EngineConfig(model_path="/m", model=load_model_config(DEMO_MODEL))


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
