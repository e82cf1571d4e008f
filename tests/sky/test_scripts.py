"""The shell in `sky/`: checked by bash and shellcheck, then run as SkyPilot runs it, with stand-ins that record their arguments.

The arguments go through the real command line's parser. `make test-cloud` runs the same scripts without stand-ins.
"""

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

from cluster.cli.options.parser import make_parser

TASKS: dict[str, dict[str, Any]] = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "sky").glob("*.yaml"))
}
SECTIONS = [(name, part) for name, task in TASKS.items() for part in ("setup", "run") if part in task]
IPS = "10.0.0.1\n10.0.0.2"
BATCH = {"IN": "s3://bucket/in.jsonl", "OUT": "s3://bucket/out.jsonl", "PARTS": "5", "BATCH_OPTIONS": "--max-tokens 16"}
# $CALLS gets a line for each call, $PIDS the process of each that stays. What is asked whether something is up says so once it is.
STAND_IN = """\
#!/bin/bash
line=$(printf '%q ' "${0##*/}" "$@")
echo "$line" >> "$CALLS"
case "${0##*/} $1 $2" in
  "tramontane serve "*) ends=$SERVER ;;
  "tramontane batch run") ends=$PART ;;
  "ray start "*) ends=$RAY ;;
  "ray health-check "*) [ "$SKYPILOT_NODE_RANK" != 0 ] || [ -s "$PIDS" ]; ends=$? ;;
  "curl "*) [ -s "$PIDS" ]; ends=$? ;;
  *) ends=0 ;;
esac
[ "$ends" = stays ] || exit "$ends"
echo $$ >> "$PIDS"
exec tail -f /dev/null
"""


class Node:
    """A home folder with stand-ins; `run` runs a section in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.calls_path, self.pids_path = home / "calls", home / "pids"
        folder = home / "tramontane" / "bin"
        folder.mkdir(parents=True)
        for name in ("tramontane", "ray", "curl"):
            path = folder / name
            path.write_text(STAND_IN)
            path.chmod(0o755)

    def run(self, name: str, env: Mapping[str, str], **ends: str) -> int:
        """ends: the exit codes of what is started, or "stays" for what runs until it is killed."""
        script = self.home / "script.sh"
        script.write_text(TASKS[name]["run"])
        envs = {key: str(value) for key, value in TASKS[name]["envs"].items()}
        node = {
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NODE_IPS": IPS,
        }
        stand_ins = {"CALLS": str(self.calls_path), "PIDS": str(self.pids_path)}
        stand_ins |= {"SERVER": "0", "PART": "0", "RAY": "stays"} | {k.upper(): v for k, v in ends.items()}
        return subprocess.run(
            ["bash", "-i", str(script)],  # as SkyPilot does
            env={"PATH": os.environ["PATH"], "HOME": str(self.home)} | envs | node | stand_ins | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        ).returncode

    def calls(self, *program: str) -> list[list[str]]:
        calls = [shlex.split(line) for line in self.calls_path.read_text().splitlines()]
        return [call[len(program) :] for call in calls if call[: len(program)] == list(program)]

    def served(self) -> Namespace:
        (options,) = self.calls("tramontane", "serve")
        return make_parser().parse_args(["serve", *options])

    def left(self) -> list[str]:
        """Processes that were started and are still running."""
        pids = self.pids_path.read_text().split() if self.pids_path.exists() else []
        return [
            pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        ]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    for pid in node.left():
        os.kill(int(pid), 9)


@pytest.mark.parametrize(("name", "section"), SECTIONS)
def test_bash_and_shellcheck_accept_it(name: str, section: str) -> None:
    text = TASKS[name][section]
    assert text.startswith("set -e\n"), "an error in the middle must end it"
    for command in (["bash", "-n"], [Path(sys.executable).parent / "shellcheck", "--shell=bash", "-"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("gpus", "options", "device"), [("1", "", "cuda"), ("0", "", "auto"), ("1", "--device cpu", "cpu")]
)
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if "run" in task and name != "finetune.yaml"])
def test_a_gpu_that_is_paid_for_is_asked_for(name: str, gpus: str, options: str, device: str, node: Node) -> None:
    env = BATCH | {"SKYPILOT_NUM_GPUS_PER_NODE": gpus, "SKYPILOT_JOB_RANK": "0", "SKYPILOT_NUM_JOBS": "2"}
    if name == "pool-job.yaml":
        assert node.run(name, env | {"BATCH_OPTIONS": options}) == 0
        (call,) = node.calls("tramontane", "batch", "run")
        assert make_parser().parse_args(["batch", "run", *call]).device == device
        return
    # container.yaml finds the command there.
    env |= {"PATH": f"{node.home / 'tramontane' / 'bin'}:{os.environ['PATH']}"}
    assert node.run(name, env | {"SERVE_OPTIONS": options}, server="stays" if name == "batch.yaml" else "0") == 0
    assert node.served().device == device


@pytest.mark.parametrize("name", ["serve.yaml", "service.yaml", "service-on-demand.yaml", "private.yaml"])
@pytest.mark.parametrize(("gpus", "ranks"), [("0", 1), ("1", 1), ("4", 4)])
def test_one_node(name: str, gpus: str, ranks: int, node: Node) -> None:
    env = {"SKYPILOT_NUM_GPUS_PER_NODE": gpus, "SERVE_OPTIONS": "--max-model-len 8192 --max-num-seqs 8"}
    assert node.run(name, env) == 0
    served = node.served()
    assert served.model == "mistralai/Mistral-7B-Instruct-v0.3"
    assert served.tensor_parallel_size == ranks
    assert served.host == ("127.0.0.1" if name == "private.yaml" else "0.0.0.0") and served.port == 8000
    assert served.drain_timeout < 30, "SkyPilot kills after 30 s"
    assert (served.max_model_len, served.max_num_seqs) == (8192, 8)


def test_a_load_balancer_needs_no_key_to_probe(node: Node) -> None:
    assert node.run("service.yaml", {}) == 0
    assert node.served().public_health


def test_the_shortest_way_makes_a_key_and_keeps_it(node: Node) -> None:
    stand_in = node.home / "tramontane" / "bin" / "tramontane"
    stand_in.write_text('#!/bin/bash\necho "$TRAMONTANE_API_KEY ${HF_TOKEN-none}" >> "$CALLS"\n')
    for _ in range(2):
        assert node.run("mistral-7b-v0.1.yaml", {"TRAMONTANE_API_KEY": "", "HF_TOKEN": ""}) == 0
    (first, token), (second, _) = (line.split() for line in node.calls_path.read_text().splitlines())
    path = node.home / "tramontane-api-key"
    assert first == second == path.read_text().strip() and len(first) == 64
    assert path.stat().st_mode & 0o077 == 0, "others on the node could read it"
    assert token == "none", "an empty token would be sent to the Hub"
    assert node.run("mistral-7b-v0.1.yaml", {"TRAMONTANE_API_KEY": "mine", "HF_TOKEN": "t"}) == 0
    assert node.calls_path.read_text().splitlines()[-1] == "mine t"


def test_the_container_serves_what_is_mounted(node: Node) -> None:
    env = {"PATH": f"{node.home / 'tramontane' / 'bin'}:{os.environ['PATH']}"}
    assert node.run("container.yaml", env) == 0
    served = node.served()
    assert (served.model, served.served_model_name) == ("/weights", "mistralai/Mistral-7B-Instruct-v0.3")


def test_the_private_address(node: Node) -> None:
    assert node.run("private.yaml", {"HOST": ""}) == 0
    assert node.served().host == "10.0.0.1"


def test_without_a_model_the_demo_model_is_served_and_a_failure_fails_the_job(node: Node) -> None:
    assert node.run("serve.yaml", {"MODEL": ""}, server="2") == 2
    assert node.served().model is None


@pytest.mark.parametrize(("asked", "ranks", "replicas"), [("", 8, 1), ("2", 2, 4)])
def test_tensor_parallel(asked: str, ranks: int, replicas: int, node: Node) -> None:
    assert node.run("serve-tp.yaml", {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "TENSOR_PARALLEL_SIZE": asked}) == 0
    assert (node.served().tensor_parallel_size, node.served().replicas) == (ranks, (replicas, replicas))


@pytest.mark.parametrize(
    ("gpus", "ranks_asked", "replicas_asked", "ranks", "replicas"),
    [
        ("1", "", "", 1, (2, 2)),
        ("4", "", "", 4, (2, 2)),
        ("1", "2", "", 2, (1, 1)),
        ("4", "2", "1:4", 2, (1, 4)),
        ("0", "", "", 1, (2, 2)),
    ],
)
def test_the_head_of_a_cluster(
    gpus: str, ranks_asked: str, replicas_asked: str, ranks: int, replicas: tuple[int, int], node: Node
) -> None:
    env = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": gpus}
    assert node.run("cluster.yaml", env | {"TENSOR_PARALLEL_SIZE": ranks_asked, "REPLICAS": replicas_asked}) == 0
    served = node.served()
    assert served.ray_address == "10.0.0.1:6379"
    assert (served.tensor_parallel_size, served.replicas) == (ranks, replicas)
    (ray,) = node.calls("ray", "start")
    assert {"--head", "--block", "--node-ip-address=10.0.0.1", "--dashboard-host=127.0.0.1"} <= set(ray)
    assert f"--num-gpus={gpus}" in ray
    assert node.left() == [], "Ray must end with the job: the next one would find its ports taken"


def test_a_server_that_fails_fails_the_cluster(node: Node) -> None:
    assert node.run("cluster.yaml", {"SKYPILOT_NUM_NODES": "2"}, server="3") == 3
    assert node.left() == []


def test_another_node_of_a_cluster_joins_the_head(node: Node) -> None:
    env = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    assert node.run("cluster.yaml", env, ray="1") == 1, "when its Ray has ended, so has the node"
    assert node.calls("ray", "health-check") == [["--address", "10.0.0.1:6379"]]
    (ray,) = node.calls("ray", "start")
    assert {"--block", "--node-ip-address=10.0.0.2", "--address=10.0.0.1:6379"} <= set(ray)
    assert node.calls("tramontane") == []


@pytest.mark.parametrize("part", ["0", "1"])  # 1: the part has failed lines, or failed itself; `merge` tells which
def test_a_batch_runs_each_part_and_merges_them(part: str, node: Node) -> None:
    assert node.run("batch.yaml", BATCH, server="stays", part=part) == 0
    runs = [make_parser().parse_args(["batch", "run", *call]) for call in node.calls("tramontane", "batch", "run")]
    assert sorted(str(run.part) for run in runs) == sorted(str(share) for share in shares(5))
    assert {(run.source, run.output, run.max_tokens) for run in runs} == {(BATCH["IN"], BATCH["OUT"], 16)}
    assert {run.url for run in runs} == {"http://127.0.0.1:8000"}
    program, *words = node.calls()[-1]
    merge = make_parser().parse_args(words)
    assert (program, words[:2]) == ("tramontane", ["batch", "merge"])
    assert (merge.target, merge.parts, merge.overwrite) == (BATCH["OUT"], 5, True)
    assert node.served().host == "127.0.0.1", "without a key it must not be reached from elsewhere"
    assert node.left() == []


@pytest.mark.parametrize("name", ["batch.yaml", "pool-job.yaml"])
@pytest.mark.parametrize("missing", ["IN", "OUT"])
def test_without_a_file_nothing_is_started(name: str, missing: str, node: Node) -> None:
    assert node.run(name, BATCH | {missing: ""}) != 0
    assert not node.calls_path.exists()


def test_a_batch_whose_server_dies_stops(node: Node) -> None:
    assert node.run("batch.yaml", BATCH, server="1") != 0
    assert node.calls("tramontane", "batch") == []


def test_a_job_of_the_pool_answers_its_part(node: Node) -> None:
    env = BATCH | {"SKYPILOT_JOB_RANK": "3", "SKYPILOT_NUM_JOBS": "32"}
    assert node.run("pool-job.yaml", env) == 0
    (call,) = node.calls("tramontane", "batch", "run")
    run = make_parser().parse_args(["batch", "run", *call])
    assert str(run.part) == str(shares(32)[3])
    assert (run.source, run.output, run.max_tokens, run.url) == (BATCH["IN"], BATCH["OUT"], 16, None)
    assert run.model == TASKS["pool.yaml"]["envs"]["MODEL"]


def shares(count: int) -> list[Any]:
    """The options as the command line parses them."""
    parse = make_parser().parse_args
    return [parse(["batch", "run", "in", "-o", "out", "--part", f"{i}/{count}"]).part for i in range(count)]
