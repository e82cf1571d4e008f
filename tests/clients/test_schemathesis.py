"""schemathesis tests the promises of /openapi.json: no 5xx, no undocumented status or response, nothing accepted that it forbids, no hang.

Seeded; against the real listener and a real engine with a short context. The document does not have the served model's name: the tests
fill it in, or all requests would end with 404.
"""

import asyncio
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.servers.live_listener import KEY, MODEL, live_listener
from support.servers.live_replica import TOKENIZER

SEED = 4
REQUEST_TIMEOUT_S = 20
# The document cannot describe everything that makes a request impossible, such as a prompt that exceeds the context: a 400 is fine then.
LEFT_OUT = "positive_data_acceptance"


def with_model_name(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the only valid value of `model`."""
    named = 0
    for schema in document["components"]["schemas"].values():
        model = schema.get("properties", {}).get("model")
        if model is not None and not schema.get("title", "").endswith(
            ("Card", "Answer", "Completion", "Chunk", "List")
        ):
            strings = (
                [model]
                if model.get("type") == "string"
                else [s for s in model.get("anyOf", ()) if s.get("type") == "string"]
            )
            for string in strings:
                string["enum"] = [MODEL]
                named += 1
    assert named >= 4, "completions, chat, embeddings and others name a model"
    return document


async def run_schemathesis(cwd: Path, *options: str, **target: Any) -> tuple[int, str]:
    """Returns the number of requests and the report. Fails if schemathesis finds an error. target: arguments of live_listener."""
    async with live_listener(**target) as url, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with session.get(f"{url}/openapi.json", headers=headers) as response:
            document = with_model_name(await response.json())
        (cwd / "openapi.json").write_text(json.dumps(document))
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "schemathesis"),
            *("run", "openapi.json", "--url", url, "--header", f"Authorization: Bearer {KEY}"),
            *("--seed", str(SEED), "--generation-database", "none"),
            *("--exclude-checks", LEFT_OUT, "--request-timeout", str(REQUEST_TIMEOUT_S)),
            *(
                "--continue-on-failure",
                "--no-shrink",
                "--no-color",
                "--warnings",
                "off",
                "--output-sanitize",
                "false",
                *options,
            ),
            cwd=cwd,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        async with session.post(
            f"{url}/v1/completions", headers=headers, json={"model": MODEL, "prompt": "x", "max_tokens": 1}
        ) as response:
            assert response.status == 200, "the server must keep running"
    assert process.returncode == 0, output[-20_000:]
    counted = re.search(r"(\d+) generated", output)
    assert counted, output
    return int(counted[1]), output


def assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """No request may cause a traceback."""
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info] == []


async def test_a_few_requests_to_each_operation(tmp_path, caplog):
    num_requests, output = await run_schemathesis(tmp_path, "--phases", "fuzzing", "--max-examples", "2")
    assert num_requests >= 75, output
    assert_quiet(caplog)


@pytest.mark.fuzz
@pytest.mark.timeout(1200)
async def test_some_thousand_requests(tmp_path, caplog):
    # Thousands of these requests generate until the context is full, so that must be soon.
    model = write_tiny_checkpoint(tmp_path / "model", vocab_size=TOKENIZER.vocab_size, num_hidden_layers=1)
    options = ("--phases", "examples,coverage,fuzzing", "--max-examples", "250")
    num_requests, output = await run_schemathesis(tmp_path, *options, folder=model, max_model_len=96)
    print(f"{num_requests} requests")
    assert num_requests >= 4000, output
    assert_quiet(caplog)
