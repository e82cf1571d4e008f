"""Two servers that share a PostgreSQL database and a folder: each sees the other's batches, and continues them when the other is killed."""

import json
import signal
import threading
from pathlib import Path

import pytest
from openai import OpenAI
from support.batch.command import wait_until, write_lines
from support.servers.postgres import new_database, postgres_server
from support.servers.system_server import API_KEY, Server

NUM_LINES = 400


def start_two(data: Path, database: str) -> list[Server]:
    """At the same time, each with a Ray of its own."""
    servers: list[Server] = []

    def start() -> None:
        servers.append(Server("--data-dir", str(data), "--batch-store", database, "--max-num-seqs", "8"))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(servers) < 2:
        for server in servers:
            server.kill()
        pytest.fail("a server did not start; its thread's traceback says why")
    return servers


@pytest.mark.chaos  # two servers take half a minute to start
@pytest.mark.timeout(400)
def test_a_batch_of_a_killed_server_continues_on_the_other(tmp_path: Path) -> None:
    ids = write_lines(tmp_path / "in.jsonl", NUM_LINES, max_tokens=24)
    with postgres_server() as folder:
        servers = start_two(tmp_path / "data", new_database(folder))
        try:
            here, there = (OpenAI(base_url=f"{s.url}/v1", api_key=API_KEY, max_retries=0) for s in servers)
            file = here.files.create(file=tmp_path / "in.jsonl", purpose="batch")
            batch = here.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            assert there.batches.retrieve(batch.id).input_file_id == file.id
            assert [f.id for f in there.files.list()] == [file.id]
            assert there.files.content(file.id).content == (tmp_path / "in.jsonl").read_bytes()

            def num_done(server: Server) -> float:
                return server.metric("batch_lines_total")

            wait_until(lambda: max(map(num_done, servers)) > NUM_LINES / 10, timeout_s=100, what="some lines are done")
            done = [num_done(server) for server in servers]
            assert min(done) == 0, f"both of them run the batch: {done}"
            killed, left = (servers[i] for i in ((0, 1) if done[0] else (1, 0)))
            client = there if left is servers[1] else here
            for process in [killed.process, *killed.all_descendants()]:
                process.send_signal(signal.SIGKILL)
            killed.process.wait()
            before = client.batches.retrieve(batch.id)
            assert NUM_LINES / 10 <= before.request_counts.completed < NUM_LINES, "killed too late to prove anything"

            wait_until(
                lambda: client.batches.retrieve(batch.id).status == "completed",
                timeout_s=200,
                what="the other completes it",
            )
            after = client.batches.retrieve(batch.id)
            assert (after.request_counts.completed, after.request_counts.failed) == (NUM_LINES, 0)
            output = client.files.content(after.output_file_id).text.splitlines()
            assert [json.loads(line)["custom_id"] for line in output] == ids, "each once, in line order"
            assert num_done(left) == NUM_LINES - before.request_counts.completed, "stored lines were computed again"
            print(f"\nkilled at {before.request_counts.completed} of {NUM_LINES} lines", flush=True)
        finally:
            for server in servers:
                server.kill()
