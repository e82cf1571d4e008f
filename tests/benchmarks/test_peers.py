"""The comparison with peers without a peer: merging of rounds, targets, the page, and the client of streams against a server of its own."""

import asyncio
import json
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_models_have_the_sizes_that_they_are_named_after() -> None:
    from comparison import models

    assert round(models.LARGE.num_parameters / 1e6) == 285
    assert round(models.SMALL.num_parameters / 1e6) == 20


def test_rounds_are_merged_and_numbers_take_the_place_of_an_error(tmp_path: Path) -> None:
    from comparison.results import Results

    path = tmp_path / "peers.json"
    Results(path).add("decode", "ours int8", error="This version has no quantization.")
    assert Results(path).error("decode", "ours int8") == "This version has no quantization."
    for speed in (10.0, 30.0, 20.0):
        Results(path).add("decode", "ours int8", metrics={"decode@1": speed})
    results = Results(path)
    results.add("decode", "ours int8", error="a later round failed")
    assert results.error("decode", "ours int8") is None
    assert results.median("decode", "ours int8", "decode@1") == 20.0
    assert results.spread("decode", "ours int8", "decode@1") == (10.0, 30.0)
    assert results.median("decode", "vllm int8", "decode@1") is None
    results.remove(["decode"], ["ours int8"])
    assert results.median("decode", "ours int8", "decode@1") is None


def test_targets_are_ratios_and_say_what_was_not_measured(tmp_path: Path) -> None:
    from comparison.report import page
    from comparison.results import Results
    from comparison.subjects import subjects
    from comparison.targets import outcomes

    results = Results(tmp_path / "peers.json")
    results.add("decode", "ours bfloat16", metrics={"decode@1": 90.0})
    results.add("decode", "llama.cpp bfloat16", metrics={"decode@1": 100.0})
    results.add("start", "ours bfloat16", metrics={"ready_s": 7.0})
    results.add("decode", "vllm bfloat16", error="not installed")
    met = {outcome.target.text: (outcome.ratio, outcome.met) for outcome in outcomes(results)}
    assert met["1. one stream, bf16, in process, against llama.cpp BF16"] == (0.9, False)
    assert met["7. start to ready, demo model"] == (7.0, True)
    assert met["1. one stream, bf16, over HTTP against in process"] == (None, None)
    text = page(results, subjects(vllm=Path("none"), llama=Path("none")))
    assert "| vllm bfloat16 |  |  | not installed |" in text
    assert "not measured" in text


def test_only_its_own_table_has_the_forms_of_the_kv_cache() -> None:
    from comparison.parts import PARTS
    from comparison.subjects import subjects

    everyone = subjects(vllm=Path("none"), llama=Path("none"))
    names = [subject.name for subject in everyone]
    assert len(set(names)) == len(names)
    measured = {name: [subject.name for subject in everyone if part.includes(subject)] for name, part in PARTS.items()}
    forms = ["", ", KV cache int8", ", KV cache fp8"]
    assert set(measured.pop("kv_cache")) == {
        f"ours {dtype}{form}" for dtype in ("float32", "bfloat16") for form in forms
    }
    assert not any("KV cache" in name for names in measured.values() for name in names)


async def test_the_client_counts_tokens_and_gaps_of_streams() -> None:
    """The fake writes a token every 2 ms on 8 streams, and takes 20 ms for the first token of a long prompt."""
    from comparison import http_load

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = [int(line.split(b":")[1]) for line in head.splitlines() if line.startswith(b"Content-Length")]
            body = json.loads(await reader.readexactly(length))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
            await asyncio.sleep(0.02 if len(body["prompt"]) > 100 else 0.001)
            for _ in range(body["max_tokens"]):
                writer.write(b'data: {"choices": [{"text": "a"}]}\n\n')
                await writer.drain()
                await asyncio.sleep(0.002)
            usage = json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            writer.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
            await writer.drain()
        except ConnectionError:
            pass  # the client leaves streams that it no longer needs
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        loaded = await http_load.load(port, num_streams=4, num_prompt=8, num_output=10, vocab_size=100, seed=0)
        long = await http_load.long_prompt(port, num_streams=2, num_long=200, num_prompt=8, vocab_size=100, seed=0)
    assert loaded["gap_p50_ms@4"] >= 1.9
    assert 0 < loaded["end_to_end@4"] < 4 * 10 / (0.001 + 9 * 0.002)
    assert long["ttft_ms"] >= 20
    assert long["ttft_alone_ms"] >= 20
    assert long["undisturbed_p50_ms"] >= 1.9


async def test_a_refused_stream_says_what_the_server_answered() -> None:
    from comparison import http_load

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\nprompt is too long")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RuntimeError, match="400"):
            await http_load.read_stream(port, [1], max_tokens=1)
