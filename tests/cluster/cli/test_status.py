"""The table of `tramontane status`, and its messages when the state of the cluster cannot be read."""

import contextlib
import http.server
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console
from support.fakes.core import FACTS
from support.paths import DEMO_MODEL

from cluster.cli.client import Client
from cluster.cli.status import Sample, poll, rates, render, status, to_json
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import (
    ClusterView,
    DeploymentRecord,
    GatewayRecord,
    NodeNotice,
    RankRecord,
    ReplicaRecord,
    ReplicaState,
    StartFailure,
)
from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.errors import ConfigError, ReplicaUnavailableError
from workers.protocol import LoadReport
from workers.rank.reports import RankStats

NOW = 1_800_000_000.0
MODEL = load_model_config(DEMO_MODEL)


def rank(number: int, *, num_steps: int = 0, step_s: float = 0.0, all_reduce_s: float | None = 0.0) -> RankRecord:
    stats = RankStats(num_steps_total=num_steps, step_s_total=step_s, all_reduce_s_total=all_reduce_s)
    return RankRecord(rank=number, node_id="abcdef0123", node_ip="10.0.0.2", actor_name=f"x-rank{number}", stats=stats)


READY = ReplicaRecord(
    replica_id="r0",
    incarnation="aa",
    state=ReplicaState.READY,
    ranks=(rank(0), rank(1)),
    ready_at=NOW - 3_725,
    load=LoadReport(num_running=3, num_blocks=200, num_used_blocks=50, prefix_queries_total=10, prefix_hits_total=4),
)
VIEW = ClusterView(
    version=1,
    controller_id="c",
    spec=ClusterSpec(model_name="mistral", engine=EngineConfig(model_path="/m", model=MODEL)),
    replicas=(READY,),
    gateways=(GatewayRecord(gateway_id="g", url="http://10.0.0.1:8000", node_id=None, num_running=3, num_queued=1),),
    num_desired=2,
    scaling_reason="The backlog is 4 s.",
)


def after(view: ClusterView = VIEW, *, num_tokens: int = 500) -> ClusterView:
    """VIEW some time later: r0 generated tokens in 10 steps of 20 ms, 5 ms of each in all-reduces."""
    ranks = tuple(rank(i, num_steps=10, step_s=0.2, all_reduce_s=0.05 if i == 0 else None) for i in range(2))
    load = msgspec.structs.replace(READY.load, generated_tokens_total=num_tokens)
    return replace(view, replicas=(replace(READY, ranks=ranks, load=load), *view.replicas[1:]))


def show(*samples: Sample) -> list[str]:
    console = Console(markup=False, width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(render(samples, now=NOW))
    return capture.get().splitlines()


def test_a_ready_replica_shows_its_ranks_and_rates() -> None:
    lines = show(Sample(VIEW, 0.0), Sample(after(), 2.0))
    assert lines[0] == "mistral: 1 of 2 replicas ready. The backlog is 4 s."
    rows = [" ".join(line.split()) for line in lines if "10.0.0.2" in line]
    assert rows[0] == "r0 ready 0 10.0.0.2 20.0 5.0 3 0 25% 250 40% 1h02m"
    assert rows[1] == "1 10.0.0.2 20.0 –", "all-reduce is not measured on CUDA"
    assert lines[-1] == "Gateways: http://10.0.0.1:8000 (3 running, 1 queued)"


@pytest.mark.parametrize(
    ("quantization", "name"), [(None, "mistral (bfloat16)"), ("int4", "mistral (int4 weights and bfloat16)")]
)
def test_the_form_of_the_weights_is_named(quantization: str | None, name: str) -> None:
    facts = msgspec.structs.replace(FACTS, dtype="bfloat16", quantization=quantization)
    (line, *_) = show(Sample(replace(VIEW, facts=facts), 0.0))
    assert line.startswith(f"{name}: 1 of 2 replicas")


def test_each_of_several_deployments_has_a_line() -> None:
    records = [
        DeploymentRecord(
            name=name,
            replica_ids=ids,
            num_desired=desired,
            scaling_reason="",
            spec=replace(VIEW.spec, model_name=name),
            failure=None,
            facts=None,
        )
        for name, ids, desired in (("chat", ("chat-r0",), 2), ("code", (), 0))
    ]
    view = replace(VIEW, replicas=(replace(READY, replica_id="chat-r0"),), deployments=tuple(records))
    assert show(Sample(view, 0.0))[:2] == ["chat: 1 of 2 replicas ready", "code: 0 of 0 replicas ready"]


def test_a_preempted_node_is_named_with_its_reason() -> None:
    notice = NodeNotice(
        node_id="abcdef0123",
        node_ip="10.0.0.2",
        is_head=False,
        source="aws",
        cause="AWS terminates this spot instance.",
        deadline=NOW + 95,
        seen_at=NOW - 25,
    )
    sentence = "will be preempted in 1m35s: AWS terminates this spot instance."
    for said, text in (
        (notice, f"Node 10.0.0.2 {sentence}"),
        (replace(notice, drained_at=NOW - 23.5), f"Node 10.0.0.2 {sentence} It was drained 1.5 s after the notice."),
        (replace(notice, is_head=True), f"The head node 10.0.0.2, and with it the whole cluster, {sentence}"),
    ):
        shown = " ".join(" ".join(show(Sample(replace(VIEW, notices=(said,)), 0.0))).split())
        assert text in shown


def test_replicas_that_compute_other_bits_are_named() -> None:
    def kind(replica_id: str, numerics: str) -> ReplicaRecord:
        return replace(READY, replica_id=replica_id, facts=msgspec.structs.replace(FACTS, numerics=numerics))

    same = show(Sample(replace(VIEW, replicas=(kind("r0", "a"), kind("r1", "a"))), 0.0))
    assert not any("numerics" in line for line in same)
    kinds = show(Sample(replace(VIEW, replicas=(kind("r0", "a"), kind("r1", "b"), kind("r2", "a"))), 0.0))
    assert [line for line in kinds if "numerics" in line] == [
        "Replicas with the numerics a: r0, r2",
        "Replicas with the numerics b: r1",
    ]


def test_nodes_that_share_an_address_are_distinguished() -> None:
    ranks = (rank(0), replace(rank(1), node_id="ffff000000"))
    text = "\n".join(show(Sample(replace(VIEW, replicas=(replace(READY, ranks=ranks),)), 0.0)))
    assert "10.0.0.2 abcdef" in text and "10.0.0.2 ffff00" in text, text


def test_replicas_that_start_show_their_progress_and_why_they_wait() -> None:
    loading = ReplicaRecord(
        replica_id="r1", incarnation="b", state=ReplicaState.STARTING, phase="loading", progress=(30, 120)
    )
    placing = ReplicaRecord(replica_id="r2", incarnation="c", state=ReplicaState.PLACING, reason="r2 [needs] 4 GPUs.")
    draining = replace(READY, replica_id="r3", state=ReplicaState.DRAINING, drain_until=NOW + 12)
    stuck = replace(READY, replica_id="r4", load=LoadReport(stuck_ranks=(1,)))
    view = replace(
        VIEW,
        replicas=(loading, placing, draining, stuck),
        failure=StartFailure(kind="config", message="It is too big."),
    )
    text = "\n".join(show(Sample(view, 0.0)))
    wanted = (
        "loading 25%",
        "placing",
        "draining 12s",
        "1 stuck",
        "r2 [needs] 4 GPUs.",
        "No more replicas are started: It is too big.",
    )
    for words in wanted:
        assert words in text, f"{words!r} is not in\n{text}"


def test_rates_need_two_polls_of_the_same_incarnation() -> None:
    assert rates([Sample(VIEW, 0.0)])[0].tokens_per_s is None
    restarted = replace(VIEW, replicas=(replace(READY, incarnation="bb"),))
    assert rates([Sample(after(), 0.0), Sample(restarted, 2.0)])[0].tokens_per_s is None, "counters restart at zero"
    window = [Sample(VIEW, 0.0), Sample(after(num_tokens=900), 1.0), Sample(after(num_tokens=1000), 4.0)]
    assert rates(window)[0].tokens_per_s == 250, "over the whole window, not between the last two polls"


def test_json_has_the_view_and_the_rates() -> None:
    body = json.loads(to_json([Sample(VIEW, 0.0), Sample(after(), 2.0)]))
    assert body["rates"]["r0"] == {
        "tokens_per_s": 250,
        "ranks": [{"step_s": 0.02, "all_reduce_s": 0.005}, {"step_s": 0.02, "all_reduce_s": None}],
    }
    assert msgspec.convert(body, ClusterView, strict=False) == after()


Answer = tuple[int, bytes]
Serve = Callable[[list[Answer]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server on loopback that gives these answers, then the last one forever, and requires the key `secret`."""
    servers = []

    def start(answers: list[Answer]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = answers.pop(0) if len(answers) > 1 else answers[0]
                if self.headers["Authorization"] != "Bearer secret":
                    code, body = 401, b"{}"
                if self.path != "/admin/cluster":
                    code, body = 404, b"{}"
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_one_shot_prints_a_table_when_not_on_a_terminal(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve([(200, msgspec.json.encode(VIEW)), (200, msgspec.json.encode(after()))])
    status(Namespace(url=url, api_key="secret", ca_cert=None, watch=0.01, once=False, json=False))
    text = capsys.readouterr().out
    assert "mistral: 1 of 2 replicas ready" in text
    url = serve([(200, msgspec.json.encode(VIEW)), (200, msgspec.json.encode(after()))])
    status(Namespace(url=url + "/", api_key="secret", ca_cert=None, watch=0.01, once=False, json=True))
    assert json.loads(capsys.readouterr().out)["rates"]["r0"]["tokens_per_s"] > 0


def test_on_a_terminal_it_runs_until_ctrl_c_and_through_a_restart(serve: Serve) -> None:
    url = serve([(200, msgspec.json.encode(VIEW)), (503, b""), (200, msgspec.json.encode(after()))])
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "cluster.cli.main",
        "status",
        "--url",
        url,
        "--api-key",
        "secret",
        "--watch",
        "0.1",
    ]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, text=True) as process:
        os.close(follower)
        try:
            for words in ("1 of 2 replicas ready", "answered 503 Service Unavailable", "20.0"):
                read_until(leader, words)
            process.send_signal(signal.SIGINT)
            read_to_the_end(leader)  # a full terminal would hold it up
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
            os.close(leader)
    assert process.returncode == 0 and "Traceback" not in errors, errors


def read_to_the_end(fd: int) -> None:
    """Until the other end of the terminal is closed."""
    with contextlib.suppress(OSError):
        while select.select([fd], [], [], 20)[0]:
            os.read(fd, 65_536)


def read_until(fd: int, words: str) -> None:
    seen = b""
    deadline = time.monotonic() + 30
    while words.encode() not in seen:
        assert time.monotonic() < deadline, f"{words!r} did not come in\n{seen.decode()}"
        if select.select([fd], [], [], 1)[0]:
            seen += os.read(fd, 65_536)


def test_what_cannot_be_read_is_reported_in_a_message(serve: Serve) -> None:
    url = serve([(200, b'{"replicas": 3}')])
    cases = (
        (
            url,
            None,
            ConfigError,
            "requires an API key. Give a key that may do this with --api-key or TRAMONTANE_API_KEY",
        ),
        (url, "wrong", ConfigError, "refused the API key"),
        (url + "/api", "secret", ConfigError, "has no /admin/cluster. Give the address of a Tramontane server"),
        (url, "secret", ConfigError, "Incompatible server version at"),
        (serve([(500, b"")]), "secret", ReplicaUnavailableError, "answered 500 Internal Server Error"),
        (
            "http://127.0.0.1:1",
            None,
            ReplicaUnavailableError,
            "Nothing answers at http://127.0.0.1:1 (Connection refused)",
        ),
        ("localhost:8000", None, ConfigError, "Write it like http://127.0.0.1:8000"),
    )
    for address, key, error, words in cases:
        with pytest.raises(error) as caught, Client(address, api_key=key) as client:
            poll(client)
        assert words in str(caught.value), f"{address} gives {caught.value}"
