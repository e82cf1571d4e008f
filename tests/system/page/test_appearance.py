"""How the page looks and is used: themes, a phone, the keyboard alone, and the documentation of the API."""

import re

import pytest
from support.servers.page_site import KEY, MARKS, MODEL, TEXT, Site, playwright

pytestmark = MARKS


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
