"""Ray's own node autoscaler under ours, without a cloud: pending placement groups make nodes come, released ones let them go.

Ray's fake multi-node provider starts each node as processes on this machine.
"""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_hosts import RayHosts, free_port
from system_server import Server

FAKE_HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
NODE_TYPE = "ray.worker.cpu"


def autoscaling_config(folder: Path, gcs_address: str) -> Path:
    """At most two nodes of one CPU, given back after some seconds without use."""
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": gcs_address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            NODE_TYPE: {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config |= {f"{name}_commands": [] for name in commands}  # Ray adds its defaults for known providers only
    config |= {
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
    }
    path = folder / "autoscaling.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def hosts(tmp_path) -> Iterator[RayHosts]:
    env = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    port = free_port()
    config = autoscaling_config(tmp_path, f"127.0.0.1:{port}")
    hosts = RayHosts([0], port=port, head_options=[f"--autoscaling-config={config}"], head_env=env)
    try:
        yield hosts
    finally:
        hosts.close()


def num_raylets(hosts: RayHosts) -> int:
    """Nodes of the cluster, the head included."""
    count = 0
    for pid in hosts.processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        count += command.endswith(b"/raylet")
    return count


@pytest.mark.chaos  # a minute of waiting for nodes
@pytest.mark.timeout(400)
def test_nodes_come_with_the_load_and_go_with_it(hosts):
    began = time.monotonic()
    server = Server(
        "--ray-address",
        hosts.address,
        "--replicas",
        "0:2",
        "--max-num-seqs",
        "2",
        "--scale-down-after",
        "12",
        env=hosts.env,
    )
    try:
        figures = {"first replica on a new node": time.monotonic() - began}
        assert "Needed: one rank with 1 CPU." in server.output, "nobody was told what is waited for"
        assert num_raylets(hosts) == 2
        expected = server.complete(prompt="class A:\n", max_tokens=150, seed=1, ignore_eos=True)["choices"][0]["text"]

        began = time.monotonic()
        over, texts = threading.Event(), []

        def load() -> None:
            while not over.is_set():
                body = {"prompt": "class A:\n", "max_tokens": 150, "seed": 1, "ignore_eos": True}
                texts.append(server.complete(**body)["choices"][0]["text"])

        threads = [threading.Thread(target=load, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        server.wait_for(lambda: len(server.replicas("ready")) == 2, timeout_s=120, what="scale up to two replicas")
        figures["second replica on another new node"] = time.monotonic() - began
        assert num_raylets(hosts) == 3
        over.set()
        for thread in threads:
            thread.join(100)
        assert texts and set(texts) == {expected}

        began = time.monotonic()
        server.wait_for(lambda: not server.replicas(), timeout_s=120, what="scale down to none")
        figures["no replica left"] = time.monotonic() - began
        server.wait_for(lambda: num_raylets(hosts) == 1, timeout_s=120, what="give its nodes back")
        figures["no node left"] = time.monotonic() - began
        status, health = server.health()
        assert status == 200, f"asleep is healthy: {health}"

        began = time.monotonic()
        again = server.complete(prompt="class A:\n", max_tokens=150, seed=1, ignore_eos=True)
        figures["a request wakes a replica"] = time.monotonic() - began
        assert again["choices"][0]["text"] == expected
        print(json.dumps({name: f"{seconds:.1f} s" for name, seconds in figures.items()}))
    finally:
        server.kill()
