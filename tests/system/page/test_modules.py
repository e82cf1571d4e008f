"""Single modules of the page: events from bytes, quantiles, and requests as commands and programs to copy."""

import ast
import asyncio
import itertools
import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
from support.servers.page_site import KEY, MARKS, MODEL, TOKENIZER, Site

pytestmark = MARKS


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


async def test_quantiles_are_those_of_prometheus(site: Site) -> None:
    await site.open()
    asked = [[[1, 2, 4], [0, 10, 10, 10], 0.5], [[1, 2], [5, 10, 10], 0.99], [[1], [0, 4], 0.5], [[1], [0, 0], 0.5]]
    found = await site.evaluate("operations_view.js", "(m, a) => a.map((x) => m.quantile(...x))", asked)
    assert found == [1.5, pytest.approx(1.98), 1, None]
    fresh = [{"counts": [1, 2, 2]}, {"counts": [1, 5, 6]}]
    assert await site.evaluate("operations_view.js", "(m, [a, b]) => m.since(a, b)", fresh) == [0, 3, 4]


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


def run_shell(script: str) -> Sequence[str]:
    """What a POSIX shell's command printed, split at NUL."""
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split("\0")


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
