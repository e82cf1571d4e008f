"""Batches on a real `tramontane serve` that is killed during a batch: restarted on the same data directory, it completes the batch.

Uses the official client, unchanged.
"""

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import openai
import psutil
import pytest
from support.servers.system_server import API_KEY, Server

NUM_LINES = 120
ENDED = ("completed", "failed", "expired", "cancelled")


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60)


def write_lines(path: Path, num_lines: int) -> None:
    """Each line has its own prompt and length, and no seed."""
    with path.open("w") as file:
        for i in range(num_lines):
            body = {"model": "demo_model", "prompt": f"def f{i}(", "max_tokens": 8 + i % 16, "ignore_eos": True}
            line = {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def retrieve_until(client: openai.OpenAI, batch_id: str, condition, timeout_s: float = 120.0):
    deadline = time.monotonic() + timeout_s
    while not condition(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def kill_all(server: Server) -> None:
    """Kills every process of the server at once, like a power failure."""
    processes = [server.process, *server.all_descendants()]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # one of Ray's may end by itself, or with its parent
            process.send_signal(signal.SIGKILL)
    server.kill()
    shutil.rmtree(server.folder)  # no process is left to do it


@pytest.mark.timeout(300)
def test_a_batch_outlives_its_server(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_lines(source, NUM_LINES)
    options = ("--data-dir", str(tmp_path / "data"))
    first = Server(*options)
    try:
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
        client = client_of(first)
        file = client.files.create(file=source.open("rb"), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"of": "a test"}
        )
        before = retrieve_until(client, batch.id, lambda b: b.request_counts.completed >= 20)
        assert before.status == "in_progress", "killed after the batch had ended: make it longer"
    finally:
        kill_all(first)
    second = Server(*options)
    try:
        client = client_of(second)
        found = client.batches.retrieve(batch.id)
        assert found.request_counts.completed >= before.request_counts.completed, "what was counted was on disk"
        ended = retrieve_until(client, batch.id, lambda b: b.status in ENDED)
        assert (ended.status, ended.error_file_id) == ("completed", None)
        assert ended.request_counts.completed == ended.request_counts.total == NUM_LINES
        lines = [json.loads(line) for line in client.files.content(ended.output_file_id).text.splitlines()]
        assert [line["custom_id"] for line in lines] == [f"line-{i}" for i in range(NUM_LINES)], "each once, in order"
        for i, line in enumerate(lines):
            assert line["response"]["body"]["usage"]["completion_tokens"] == 8 + i % 16
        assert ended.usage.output_tokens == sum(8 + i % 16 for i in range(NUM_LINES))
        # A batch that is running when the server is stopped does not delay the stop, and is not lost.
        other = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        retrieve_until(client, other.id, lambda b: b.status == "in_progress" and b.request_counts.completed > 0)
        asked = time.monotonic()
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(60) == 0, second.output
        assert time.monotonic() - asked < 25, "lines of a batch delayed the stop"
    finally:
        second.kill()
    assert second.left_over() == []
