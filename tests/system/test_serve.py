"""End to end, as a user runs it: two tensor-parallel ranks on Ray, HTTP, the official client, then SIGTERM."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import urllib.request

import aiohttp
import openai
import pytest
from support.batch.command import BatchCommand, answers, write_lines
from support.servers.ports import listening
from support.servers.system_server import API_KEY, COMMAND, Server

MODEL = "demo_model"
NUM_STREAMS = 200


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def test_the_banner_says_what_to_do(server):
    assert re.search(r"Ready in \d+\.\d s\.", server.output)
    assert "Dashboard  http://127.0.0.1:" in server.output
    assert re.search(
        r"Engine     the CPU: up to 64 sequences and 1,024 tokens a step \(batches: 4 beside other requests\); ",
        server.output,
    )
    assert "Tokenizer  SentencePiece (tokenizer.model.v3, 4,096 tokens)" in server.output
    assert API_KEY not in server.output
    for phase in ("Starting Ray", "Joining the ranks", "Starting the engine"):
        assert phase in server.output


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_banners_curl_line_works_as_pasted(server):
    line = re.search(r"Try +(curl .*)", server.output)[1]
    env = {**os.environ, "TRAMONTANE_API_KEY": API_KEY}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env=env, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"]


def test_health_and_models(server, client):
    status, health = server.health()
    assert (status, health["status"]) == (200, "ok")
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion(client):
    answer = client.completions.create(model=MODEL, prompt="def fibonacci(n):", max_tokens=16, temperature=0)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.completions.create(model=MODEL, prompt="def fibonacci(n):", max_tokens=16, temperature=0)
    assert again.choices[0].text == answer.choices[0].text


def test_completion_stream_is_the_completion(client):
    options = {"model": MODEL, "prompt": "import os\n", "max_tokens": 24, "seed": 7, "temperature": 0.8}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_chat_and_chat_stream(client):
    options = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What does os.path.join do?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_errors_have_openais_form(server, client):
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="x " * 6000, max_tokens=1)
    assert too_long.value.body["message"]
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as stranger,
    ):
        stranger.models.list()


def test_the_profile_has_the_gateway_and_every_rank_on_one_clock(server, client, profile):
    client.completions.create(model=MODEL, prompt="import os\n", max_tokens=32, extra_body={"ignore_eos": True})
    server.wait_for(lambda: "The profile of 20 steps is in" in server.output, timeout_s=60, what="write the profile")
    events = json.loads(profile.read_bytes())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = {name: {e["name"] for e in events if processes[e["pid"]] == name} for name in processes.values()}
    assert set(found) == {"gateway", "replica r0 rank 0", "replica r0 rank 1"}
    assert {"schedule", "broadcast", "execute", "sample", "update", "all_reduce"} <= found["replica r0 rank 0"]
    assert {"wait for rank 0", "execute", "all_reduce"} <= found["replica r0 rank 1"]
    assert {"frame", "detokenize"} <= found["gateway"]
    times = [e["ts"] for e in events if e["name"] == "execute"]
    frames = [e["ts"] for e in events if e["name"] == "frame"]
    assert min(times) < max(frames) < max(times) + 20e6, "the gateway got its frames while the ranks computed"


def test_rays_own_endpoint_shows_the_metrics_of_gateway_and_ranks(server, client):
    client.completions.create(model=MODEL, prompt="import os\n", max_tokens=4)
    first_tokens = server.metric("time_to_first_token_seconds_count")
    assert first_tokens > 0
    wanted = {
        "kv_cache_usage_perc": ('engine="r0"', 'model_name="demo_model"'),
        "time_to_first_token_seconds_bucket": ('le="+Inf"',),
        "rank_step_seconds_total": ('engine="r0"', 'rank="1"'),
    }

    found: dict[str, float] = {}

    def all_shown() -> bool:
        """Over several reads: Ray's agent leaves out a gauge that was not reported for some seconds, as on a busy machine."""
        for line in ray_metrics(server).splitlines():
            name, _, labels = line.partition("{")
            name = name.removeprefix("ray_tramontane_")
            if name in wanted and all(label in labels for label in wanted[name]):
                found[name] = float(line.split()[-1])
        return found.keys() == wanted.keys() and found["time_to_first_token_seconds_bucket"] == first_tokens

    server.wait_for(all_shown, timeout_s=80, what="show its metrics at Ray's endpoint")
    assert 0 <= found["kv_cache_usage_perc"] <= 1 and found["rank_step_seconds_total"] > 0


def ray_metrics(server: Server) -> str:
    """What the agent of Ray's node says to Prometheus. Its other ports want a token."""
    for _, _, port in (found for found in listening(server) if found[0] == "ray::DashboardAgent"):
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response,
        ):
            return response.read().decode()
    return ""


async def stream_text(session: aiohttp.ClientSession, url: str, index: int, *, cut_after: int | None) -> str | None:
    """The streamed text, checked to be complete. None if the client disconnects after `cut_after` chunks."""
    body = {
        "model": MODEL,
        "prompt": f"def function_{index}(self, value):\n",
        "max_tokens": 12 + index % 20,
        "temperature": 1.0,
        "seed": index,
        "stream": True,
    }
    parts, finish_reason, num_chunks = [], None, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        if cut_after == 0:
            return None
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                assert finish_reason is not None, "the stream ended without a finish_reason"
                return "".join(parts)
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            parts.append(chunk["choices"][0]["text"])
            finish_reason = chunk["choices"][0]["finish_reason"]
            num_chunks += 1
            if num_chunks == cut_after:
                return None
    raise AssertionError(f"stream {index} ended without [DONE]")


async def run_streams(url: str, cuts: dict[int, int]) -> list[str | None]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    timeout = aiohttp.ClientTimeout(total=250)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        return await asyncio.gather(
            *(stream_text(session, url, i, cut_after=cuts.get(i)) for i in range(NUM_STREAMS)),
        )


@pytest.mark.timeout(300)
async def test_200_streams_of_which_a_third_disconnect_leave_nothing_and_do_not_change_the_others(server):
    undisturbed = await run_streams(server.url, {})
    assert all(text is not None for text in undisturbed)
    rng = random.Random(2)
    cuts = {i: rng.randrange(10) for i in rng.sample(range(NUM_STREAMS), NUM_STREAMS // 3)}
    texts = await run_streams(server.url, cuts)
    for i in range(NUM_STREAMS):
        if i not in cuts:
            assert texts[i] == undisturbed[i], f"stream {i} differs from its undisturbed run"
        else:
            assert texts[i] is None
    gauges = ("num_requests_inflight", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    await asyncio.to_thread(
        server.wait_for, lambda: not any(map(server.metric, gauges)), timeout_s=60, what="become empty"
    )
    assert server.health()[0] == 200


def test_the_batch_command_in_two_parts_and_merged(server, tmp_path):
    ids = write_lines(tmp_path / "in.jsonl", 20, max_tokens=8, bad_every=10)
    out, env = tmp_path / "out.jsonl", {**os.environ, "TRAMONTANE_API_KEY": API_KEY}
    parts = [
        BatchCommand(
            "run",
            tmp_path / "in.jsonl",
            "-o",
            out,
            "--url",
            server.url,
            "--part",
            f"{i}/2",
            env=env,
            log=tmp_path / f"log{i}",
        )
        for i in range(2)
    ]
    try:
        codes = [part.wait(80) for part in parts]
    finally:
        for part in parts:
            part.close()
    assert codes == [1, 0], [part.output for part in parts]  # the refused lines are in the first part
    merge = BatchCommand("merge", out, "--remove-parts", log=tmp_path / "log")
    assert merge.wait(30) == 1
    assert "18 of 20 lines answered" in merge.output and "Traceback" not in merge.output
    assert [json.loads(line)["custom_id"] for line in out.read_text().splitlines()] == [
        i for i in ids if i not in ("id-0", "id-10")
    ]
    assert sorted(answers(tmp_path / "out.errors.jsonl")) == ["id-0", "id-10"]
    assert not list(tmp_path.glob("*.part-*"))


def test_status_of_a_server_on_this_machine_needs_no_proxy(server):
    """Three variables name a proxy where nothing listens."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    env["TRAMONTANE_API_KEY"] = API_KEY
    command = [str(COMMAND), "status", "--once", "--url", server.url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "r0" in done.stdout, done.stderr


def test_sigterm_lets_a_stream_finish_refuses_new_ones_and_leaves_nothing(server, client):
    """Last in this file, because it stops the server."""
    stream = client.completions.create(
        model=MODEL, prompt="class A:\n", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    done = threading.Event()
    threading.Thread(target=lambda: (server.process.wait(), done.set()), daemon=True).start()
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length", "the running stream was cut off"
    assert done.wait(80), server.output
    assert server.process.returncode == 0, server.output
    assert server.left_over() == []
    assert "Traceback" not in server.output
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
