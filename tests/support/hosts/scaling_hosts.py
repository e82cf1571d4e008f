"""A Ray cluster that scales itself, without a cloud: Ray's fake multi-node provider starts each node as processes on this machine."""

from pathlib import Path

import yaml

from support.hosts.ray_hosts import RayHosts, free_port

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


def scaling_hosts(folder: Path) -> RayHosts:
    """A head without CPUs; nodes come when something waits for a place. `close` it."""
    env = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    port = free_port()
    config = autoscaling_config(folder, f"127.0.0.1:{port}")
    return RayHosts([0], port=port, head_options=[f"--autoscaling-config={config}"], head_env=env)


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
